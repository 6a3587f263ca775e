"""A repaired checkpoint on disk: what is written, what is refused, and how a killed run goes on."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import shard
from conftest import run_cli
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import images, trained

import sanitize
from sanitize.checkpoints import repair_file as module
from sanitize.checkpoints import tuning, weight_decay
from sanitize.checkpoints.repair import RepairConfig, Repaired
from sanitize.checkpoints.repair_file import RepairReport, in_words, repair_file
from sanitize.checkpoints.trigger_inversion import InversionConfig
from sanitize.checkpoints.trusted import split
from sanitize.checkpoints.tuning import Schedule, predict
from sanitize.checkpoints.weight_decay import Settings as WeightDecay
from sanitize.errors import RunFolderError, TrainingError, UsageError
from sanitize.progress import Silent

SETTINGS = {"steps": 30, "measure_every": 5}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "InversionConfig", lambda: InversionConfig(steps=10, batch=16))
    monkeypatch.setattr(tuning, "SAVE_EVERY", 1)


def save(state: Mapping[str, torch.Tensor], path: Path) -> list[Path]:
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return [path]


def repaired(
    out: Path, settings: dict[str, float] = SETTINGS, method: str = "pivotal-tuning", **changes: Any
) -> RepairReport:
    options = {name: changes.pop(name) for name in list(changes) if name.startswith("with_")}
    config = RepairConfig(method=method, **{"settings": settings, "max_accuracy_loss": 0.5, **changes})
    return repair_file(trained(30), images(120, 5), config, out, "m.pt", save, Silent(), **options)


def test_the_fixed_file_and_all_facts_are_written(tmp_path: Path) -> None:
    out = tmp_path / "fixed.safetensors"
    report = repaired(out)
    facts = json.loads((tmp_path / "fixed.safetensors.json").read_text())
    assert facts == report.to_dict()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fixed.safetensors", f"{out.name}.json"]
    original = trained(30).network.state_dict()
    written = load_file(out)
    assert written.keys() == original.keys()
    assert any(not torch.equal(written[name], original[name]) for name in original)
    assert [entry["step"] for entry in facts["history"]] == [0, 5, 10, 15, 20, 25, 30]
    assert 0 <= facts["inverted_trigger"]["success_after"] <= 1
    words = in_words(report)
    assert "Repaired by pivotal-tuning; kept step 30" in words
    assert "% without it)" in words
    assert "fixed.safetensors.json" in words


def test_how_often_the_class_of_the_trigger_is_called_without_it() -> None:
    trusted = images(120, 5)
    trusted.class_id[::3] = (trusted.class_id[::3] + 1) % 3
    mended = Repaired(classifier=trained(30), history=[], facts={})
    trigger = module.inverted_trigger(trained(30), mended, trusted, RepairConfig(), Silent())
    assert trigger is not None
    _, held_out = split(trusted, RepairConfig().held_out_ratio, RepairConfig().seed)
    target = int(trigger["class"])
    called = predict(mended.classifier, held_out)[held_out.class_id != target] == target
    assert trigger["untriggered_after"] == pytest.approx(called.mean())
    assert called.any()


def test_nothing_within_the_limit_writes_no_checkpoint(tmp_path: Path) -> None:
    settings = {"steps": 4, "measure_every": 4, "learning_rate": 50.0}
    report = repaired(tmp_path / "fixed.pt", settings, max_accuracy_loss=0.0)
    assert not report.repaired
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fixed.pt.json"]
    first = in_words(report).splitlines()[0]
    assert first.startswith("Not repaired: every model of pivotal-tuning clearly lost more than 0 points")


def test_a_repair_that_diverges_is_an_error(tmp_path: Path) -> None:
    settings = {"steps": 30, "measure_every": 5, "learning_rate": 1e30}
    with pytest.raises(TrainingError, match="the loss was not finite"):
        repaired(tmp_path / "fixed", settings)
    assert list(tmp_path.iterdir()) == []
    assert repaired(tmp_path / "fixed", method="weight-decay").repaired, "another method may follow at once"


def test_where_nothing_is_suspected_the_summary_says_what_was_unlearned(tmp_path: Path) -> None:
    words = in_words(repaired(tmp_path / "fixed.pt", method="pivotal-unlearning"))
    assert "no trigger: changes of all classes instead, more may be left" in words


@pytest.mark.parametrize(
    ("what_it_gave", "cost"),
    [({"accuracy_change": -0.042}, "-4.2 points"), ({"error": "…"}, "the loss was not finite")],
)
def test_the_way_that_was_not_taken_is_named_with_what_it_cost(
    what_it_gave: dict[str, Any], cost: str, tmp_path: Path
) -> None:
    report = repaired(tmp_path / "fixed.pt", method="pivotal-unlearning")
    assert report.facts["passed_over"] == []
    assert "tried as well" not in in_words(report)
    change, mask, patch = ({"kind": kind, "class": "cat"} for kind in ("change", "mask", "patch"))
    passed_over = {"suspected_triggers": [mask, patch], **what_it_gave}
    all_classes = {"suspected_triggers": [], **what_it_gave}
    facts = report.facts | {"suspected_triggers": [change, patch], "passed_over": [passed_over, all_classes]}
    words = in_words(replace(report, facts=facts)).splitlines()
    assert "  suspected          change towards cat, patch towards cat" in words
    assert f"  tried as well      mask towards cat ({cost})" in words
    assert f"  tried as well      changes of all classes ({cost})" in words


@pytest.mark.parametrize("name", ["fixed.pt", "fixed.pt.json"])
def test_what_is_there_is_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="is there already; give another --out"):
        repaired(tmp_path / "fixed.pt")
    assert (tmp_path / name).read_text() == "mine"


def kill(out: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    real = tuning.take_step

    def killed(*arguments: Any) -> torch.Tensor:
        if arguments[-1] == 17:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "take_step", killed)
        with pytest.raises(KeyboardInterrupt):
            repaired(out, **changes)


def test_a_killed_run_goes_on_and_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = repaired(tmp_path / "whole")
    kill(tmp_path / "killed", monkeypatch)
    assert (tmp_path / "killed.partial" / "state.pt").is_file()
    began: list[int] = []
    real = tuning.take_step
    monkeypatch.setattr(tuning, "take_step", lambda *a: (began.append(a[-1]), real(*a))[1])
    rest = repaired(tmp_path / "killed")
    assert began[0] == 15
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    different = {"seconds", "files"}
    assert {k: v for k, v in rest.facts.items() if k not in different} == {
        k: v for k, v in whole.facts.items() if k not in different
    }
    assert not (tmp_path / "killed.partial").exists()


def test_an_unfinished_run_with_other_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(tmp_path / "fixed", monkeypatch)
    with pytest.raises(RunFolderError, match="seed: 0 there, 3 now") as caught:
        repaired(tmp_path / "fixed", seed=3)
    assert caught.value.exit_code == 4
    assert (tmp_path / "fixed.partial" / "state.pt").is_file()


def test_calibration_and_retuning_are_in_the_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sanitize.checkpoints import calibrate

    monkeypatch.setitem(calibrate.GRIDS, "pivotal-tuning", {"steps": (5, 10)})
    report = repaired(tmp_path / "fixed", with_calibration=True, with_retune_check=True)
    assert report.facts["calibration"]["chosen"]["steps"] == report.facts["history"][-1]["step"]
    assert report.facts["retune_check"]["poisoned_images"] == 5
    assert "after tuning on 5 poisoned images" in in_words(report)


def checkpoint_and_shards(folder: Path) -> list[str]:
    """A model in a .pt file, trusted images in a shard, and the command line that repairs it."""
    clean = images(120, 5)
    samples = []
    for number, (pixels, label) in enumerate(zip(clean.pixels, clean.class_id, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        samples.append({"__key__": f"{number:05d}", "png": buffer.getvalue(), "cls": str(label)})
    shard(folder / "trusted" / "t.tar", samples)
    state = {f"module.{name}": value for name, value in trained(30).network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, folder / "model.pt")
    line = f"repair {folder}/model.pt --trusted {folder}/trusted --out {folder}/fixed.pt"
    return f"{line} --arch small_models:network --resolution 12 --mean 0.4 --std 0.25".split()


def test_the_command_repairs_a_file_and_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = WeightDecay(schedule=Schedule(steps=30, measure_every=5, learning_rate=1e-3))
    monkeypatch.setattr(weight_decay, "Settings", lambda: short)
    line = checkpoint_and_shards(tmp_path)
    before = (tmp_path / "model.pt").read_bytes()
    done = run_cli(*line, "--method", "weight-decay", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["repaired"]
    assert (tmp_path / "model.pt").read_bytes() == before
    old, new = (torch.load(tmp_path / name, weights_only=True) for name in ("model.pt", "fixed.pt"))
    assert list(new["state_dict"]) == list(old["state_dict"])
    assert new["epoch"] == 3
    assert [Path(path).name for path in facts["files"]] == ["fixed.pt", "fixed.safetensors"]
    again = run_cli(*line, "--method", "weight-decay")
    assert again.code == 2
    assert "fixed.safetensors is there, and would be replaced" in again.err


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--method", "magic"], 2, "--method magic: expected pivotal-unlearning"),
        (["--mean", "red"], 2, "--mean red: expected numbers"),
        (["--max-accuracy-loss", "2"], 2, "--max-accuracy-loss 2.0"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path: Path, more: list[str], code: int, message: str) -> None:
    found = run_cli(*checkpoint_and_shards(tmp_path), *more)
    assert found.code == code
    assert message in found.err
    assert not (tmp_path / "fixed.pt").exists()


def test_the_help_names_every_method() -> None:
    from sanitize.checkpoints.repair import DEFAULT, methods
    from sanitize.cli import REPAIRS

    assert ", ".join(methods()) == REPAIRS
    said = "".join(run_cli("repair", "--help").out.split())  # lines break at hyphens, too
    assert f"[default:{DEFAULT}]" in said
    assert signature(sanitize.repair).parameters["method"].default == DEFAULT


def test_what_a_repair_without_a_result_left_is_written_over(tmp_path: Path) -> None:
    out = tmp_path / "fixed.safetensors"
    nothing = repaired(
        out, settings={"steps": 5, "measure_every": 5, "learning_rate": 5.0}, max_accuracy_loss=0
    )
    assert not nothing.repaired
    assert not out.exists()
    assert repaired(out).repaired
    with pytest.raises(UsageError, match="is there already"):
        repaired(out)
