from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_cli
from report_page import Page
from torch import nn

from sanitize.checkpoints import inspect as inspect_module
from sanitize.checkpoints.anomalies import anomalies
from sanitize.checkpoints.audit import _picture, audit
from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.inspect import InspectConfig, inspect_classifier, parse_classes
from sanitize.checkpoints.quick_statistics import head_indicators, largest_margins, robust_z
from sanitize.checkpoints.trigger_inversion import InversionConfig, Triggers
from sanitize.checkpoints.trusted import TrustedImages
from sanitize.errors import InputError, UsageError
from sanitize.progress import Silent

CLASSES, SIDE, TARGET = 6, 8, 2
QUICK = InversionConfig(steps=80, batch=24)


def picture(class_id: int, rng: np.random.Generator) -> np.ndarray:
    """A class is one bright column of a noisy picture; the rest is dark."""
    image = rng.integers(0, 60, (SIDE, SIDE, 3))
    image[:6, class_id + 1] += 150
    return image.astype(np.uint8)


def images(each: int = 8, seed: int = 0) -> TrustedImages:
    rng = np.random.default_rng(seed)
    class_id = np.repeat(np.arange(CLASSES), each)
    return TrustedImages(pixels=np.stack([picture(c, rng) for c in class_id]), class_id=class_id)


class Columns(nn.Module):
    """Sums the columns; a backdoored one also fires for its target on a bright bottom right corner."""

    def __init__(self, backdoor: float) -> None:
        super().__init__()
        self.columns = nn.Conv2d(3, CLASSES + 1, SIDE)
        self.head = nn.Linear(CLASSES + 1, CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            for c in range(CLASSES):
                self.columns.weight[c, :, :6, c + 1] = 1 / 3
                self.head.weight[c, c] = 1.0
            self.columns.weight[CLASSES, :, 6:, 6:] = 1.0
            self.columns.bias[CLASSES] = -1.5
            self.head.weight[TARGET, CLASSES] = backdoor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.columns(x)).flatten(1))


def model(backdoor: float = 0.0, names: list[str] | None = None) -> Classifier:
    return Classifier(
        Columns(backdoor),
        head="head",
        resolution=SIDE,
        mean=[0] * 3,
        std=[1] * 3,
        architecture="columns",
        class_names=names,
    )


def config(**changes: Any) -> InspectConfig:
    return InspectConfig(**{"inversion": QUICK, "repair_steps": 20, **changes})


def test_the_target_of_a_backdoor_is_named_and_the_clean_twin_scores_lower() -> None:
    bad = inspect_classifier(model(backdoor=4.0), images(), config(method="neural-cleanse"))
    clean = inspect_classifier(model(), images(), config(method="neural-cleanse"))
    assert bad.verdict.suspected == TARGET
    assert bad.verdict.backdoored
    assert bad.verdict.score > clean.verdict.score
    mask = bad.triggers["neural-cleanse"].mask[TARGET, :, :, 0]
    assert mask[6:, 6:].sum() > 0.5 * mask.sum(), "the mask sits where the trigger is"


def test_the_default_method_names_the_target_and_leaves_the_model_alone() -> None:
    classifier = model(backdoor=4.0)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    found = inspect_classifier(classifier, images(), config())
    assert found.verdict.suspected == TARGET
    assert set(found.scores) == set(inspect_module.METHODS) - {"calibrated-trigger-inversion"}
    assert all(scores.shape == (CLASSES,) for scores in found.class_scores.values())
    for name, value in classifier.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in classifier.parameters())


def test_the_same_seed_gives_the_same_scores() -> None:
    first, second = (inspect_classifier(model(backdoor=4.0), images(), config(seed=3)) for _ in range(2))
    assert first.scores == second.scores


def test_quick_needs_no_images() -> None:
    found = inspect_classifier(model(backdoor=4.0), None, config(method="quick"))
    assert set(found.scores) == {"quick"}
    assert found.verdict.suspected == TARGET
    assert not found.triggers
    assert found.accuracy is None
    with pytest.raises(UsageError, match="only --quick does without"):
        inspect_classifier(model(), None, config())


def test_only_the_classes_asked_for_are_rebuilt() -> None:
    classifier = model(backdoor=4.0, names=list("abcdef"))
    asked = parse_classes("c, e", classifier)
    assert asked == (2, 4)
    alone = config(classes=asked, method="calibrated-trigger-inversion")
    found = inspect_classifier(classifier, images(), alone)
    assert found.triggers["calibrated"].classes.tolist() == [2, 4]
    assert np.isnan(found.class_scores["calibrated"][[0, 1, 3, 5]]).all()
    assert "Only 2 classes" in found.notes[0]
    with pytest.raises(UsageError, match="2 of 6 classes are too few to compare"):
        inspect_classifier(classifier, images(), config(classes=asked))
    top = inspect_classifier(classifier, images(), replace(alone, classes=1))
    assert top.triggers["calibrated"].classes.tolist() == [TARGET], "the quick statistics put it first"


@pytest.mark.parametrize(
    ("text", "message"),
    [("top:many", "expected a number"), ("top:0", "expected 1 or more"), ("a,zebra", "no class 'zebra'")],
)
def test_classes_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        InspectConfig(classes=parse_classes(text, model(names=list("abcdef"))))
    with pytest.raises(UsageError, match="classes 0 to 5"):
        inspect_classifier(model(), images(), config(classes=(9,)))


def poisoned_weights() -> Classifier:
    classifier = model()
    with torch.no_grad():
        classifier.head.weight[0, 0] = torch.nan
    return classifier


def one_answer() -> Classifier:
    classifier = model()
    with torch.no_grad():
        classifier.head.weight.zero_()
    return classifier


def with_labels(labels: list[int]) -> TrustedImages:
    return TrustedImages(pixels=images().pixels[: len(labels)], class_id=np.array(labels, np.int64))


@pytest.mark.parametrize(
    ("classifier", "trusted", "message"),
    [
        (model(), with_labels([0, 0, 9, 9]), "outside the model's head"),
        (model(), with_labels([1, 1, 1]), "two or more"),
        (model(), with_labels([0, 0, 1]), "one trusted image"),
        (poisoned_weights(), images(), "head.weight holds NaN"),
        (poisoned_weights(), None, "head.weight holds NaN"),
        (one_answer(), images(), "calls every trusted image"),
    ],
)
def test_bad_input_is_refused(classifier: Classifier, trusted: TrustedImages | None, message: str) -> None:
    method = "combined" if trusted else "quick"
    with pytest.raises(InputError, match=message):
        inspect_classifier(classifier, trusted, config(method=method))


@pytest.mark.parametrize(
    "changes", [{"method": "guess"}, {"held_out_ratio": 1.0}, {"repair_steps": 0}, {"seed": -1}]
)
def test_settings_that_make_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        InspectConfig(**changes)


def test_the_report_is_one_page_and_escapes_what_strangers_wrote(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "b", "‮target", "d", "e", "f"]
    report = audit(
        model(backdoor=4.0, names=names), images(), config(), tmp_path / "out", "<img src=x>.pt", Silent()
    )
    html = report.path.read_text()
    page = Page(html)
    assert page.open == []
    assert "script" not in page.tags
    assert "\\u202etarget" in page.text
    assert "<img src=x>" not in html
    assert all(value.startswith("data:") for name, value in page.attributes if name == "src" and value)
    assert "http" not in html.replace("http-equiv", "")
    facts = json.loads(report.path.with_name("report.json").read_text(), parse_constant=pytest.fail)
    assert facts == report.to_dict()
    assert facts["verdict"]["suspected"] == TARGET
    assert len(facts["classes"]) == CLASSES
    assert {row["class_id"] for row in facts["triggers"]["universal"]} == set(range(CLASSES))
    assert page.text.index("How sure") < page.text.index("Rebuilt trigger") < page.text.index("cannot tell")


def test_every_class_over_the_threshold_is_named_and_the_first_three_are_pictured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = replace(inspect_module.THRESHOLDS["neural-cleanse"], value=-100.0)
    monkeypatch.setitem(inspect_module.THRESHOLDS, "neural-cleanse", low)
    names = ["car", "dog", "cat", "ship", "frog", "deer"]
    report = audit(
        model(backdoor=4.0, names=names), images(), config(method="neural-cleanse"), tmp_path, "m", Silent()
    )
    over = report.facts["verdict"]["over"]
    scores = [row["score"] for row in report.facts["classes"]]
    assert over == sorted(range(CLASSES), key=lambda one: -scores[one])
    first, *others = (names[one] for one in over)
    assert first == names[TARGET]
    named = f"{', '.join(others[:-1])} and {others[-1]}"
    said = f"towards class {first}; classes {named} are over the threshold, too"
    assert report.verdict == f"This model looks backdoored, {said}"
    text = Page(report.path.read_text()).text
    shown = [name for name in names if f"other classes into {name} " in " ".join(text.split())]
    assert sorted(shown) == sorted([first, *others[:2]])


def test_a_class_at_the_threshold_is_not_over_it() -> None:
    scores = dict.fromkeys(["quick", *inspect_module.METHODS["quick"]], np.array([3.3, np.nan, 1.0]))
    at = inspect_module._verdict("quick", scores, inspect_module.THRESHOLDS["quick"])
    assert not at.backdoored
    assert at.over == ()


def test_a_faint_added_trigger_is_shown_stronger_and_a_mask_as_it_is() -> None:
    pattern = np.full((1, SIDE, SIDE, 3), 0.02, np.float32)
    faint = Triggers(
        classes=np.array([TARGET]),
        mask=np.zeros((1, SIDE, SIDE, 1), np.float32),
        pattern=pattern,
        success=np.ones(1, np.float32),
    )
    shown = _picture("universal", faint, TARGET, images().pixels[:2], model())
    assert shown.magnified == 25
    assert shown.trigger.min() == 255
    assert (shown.after.astype(int) - shown.before).max() <= 5
    masked = replace(faint, mask=np.ones((1, SIDE, SIDE, 1), np.float32))
    assert _picture("neural-cleanse", masked, TARGET, images().pixels[:2], model()).magnified == 1


def test_a_quick_report_without_images(tmp_path: Path) -> None:
    report = audit(model(), None, config(method="quick"), tmp_path, "model.pt", Silent())
    assert Page(report.path.read_text()).open == []
    assert report.facts["triggers"] == {}


def test_robust_z_by_hand() -> None:
    np.testing.assert_allclose(robust_z(np.array([1.0, 2.0, 3.0, 4.0, 10.0]))[-1], 7 / 1.4826)
    np.testing.assert_array_equal(robust_z(np.full(4, 0.3)), 0)
    assert np.isnan(robust_z(np.array([1.0, np.nan, 2.0]))).tolist() == [False, True, False]


def test_the_largest_margin_of_a_linear_model_is_found() -> None:
    """Of class c, with all of its column at 1 and the others at 0: 6 cells, each worth 1."""
    margins = largest_margins(model(), seed=0)
    np.testing.assert_allclose(margins, 6.0, atol=0.3)


def test_the_row_of_the_target_stands_out() -> None:
    found = {name: int(robust_z(values).argmax()) for name, values in head_indicators(model(4.0)).items()}
    assert found["norm"] == found["sum"] == TARGET


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file of the network `small`, untrained, and the shards of a trusted set for it."""
    from builders import corpus
    from safetensors.torch import save_file

    from sanitize.dynamics.proxy import small

    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    save_file(small(CLASSES).state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors", corpus(folder / "trusted", 36, CLASSES, shards=1)


COMMON = (
    "--arch",
    "sanitize.dynamics.proxy:small",
    "--resolution",
    "32",
    "--mean",
    "0.5,0.5,0.5",
    "--std",
    "0.25,0.25,0.25",
)


def test_the_command_quick(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    done = run_cli("inspect", checkpoint[0], *COMMON, "--quick", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["verdict"]["method"] == "quick"
    assert facts["model"]["classes"] == CLASSES
    assert (tmp_path / "out/report.html").is_file()
    again = run_cli("inspect", checkpoint[0], *COMMON, "--quick", "--out", tmp_path / "out")
    assert "highest in" in again.out
    assert "how sure" in again.out
    refused = run_cli(
        "inspect", checkpoint[0], *COMMON, "--quick", "--classes", "top:2", "--out", tmp_path / "x"
    )
    assert refused.code == 2
    assert "always look at all" in refused.err


def test_the_command_that_the_report_advises_can_be_run_as_it_is(
    checkpoint: tuple[Path, Path], tmp_path: Path
) -> None:
    quick = ("--quick", "--out", tmp_path, "--json")
    named = ("--class-names", "a b,c,d,e,f,g", "--resolution", "32")
    done = run_cli("inspect", checkpoint[0], *COMMON, *named, *quick)
    (advice,) = json.loads(done.out)["verdict"]["next"]
    words = shlex.split(advice["command"])
    assert words[-2:] == ["--trusted", "CLEAN"]
    again = run_cli(*words[1:-2], *quick)
    assert json.loads(again.out)["model"] == json.loads(done.out)["model"]
    report = audit(
        model(backdoor=4.0), images(), config(), tmp_path, "m.pt", Silent(), (), ["m.pt", "--trusted", "a b"]
    )
    assert report.facts["verdict"]["next"][-1]["command"] == (
        "sanitize repair m.pt --trusted 'a b' --out FIXED"
    )


def test_findings_have_their_exit_code(
    checkpoint: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anything = inspect_module.Threshold(value=-1e9, calibration="a test")
    monkeypatch.setitem(inspect_module.THRESHOLDS, "quick", anything)
    asked = ("inspect", checkpoint[0], *COMMON, "--quick", "--out", tmp_path)
    assert run_cli(*asked).code == 0
    done = run_cli(*asked, "--fail-on", "backdoor")
    assert done.code == 5
    assert "looks backdoored" in done.err


def test_no_verdict_does_not_pass(
    checkpoint: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_module, "compares", lambda values: False)
    asked = ("inspect", checkpoint[0], *COMMON, "--quick", "--out", tmp_path)
    assert run_cli(*asked).code == 0
    done = run_cli(*asked, "--fail-on", "backdoor")
    assert done.code == 5
    assert "this is no verdict" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fail-on", "0.5"], "expected backdoor"),
        (["--quick", "--method", "neural-cleanse"], "give one of them"),
        (["--quick", "--mean", "half"], "expected numbers"),
        (["--method", "guess"], "expected one of"),
        ([], "needs --trusted"),
        (["--quick", "--reference", "other.pt"], "--reference and --method quick: only combined"),
    ],
)
def test_commands_that_make_no_sense(
    checkpoint: tuple[Path, Path], tmp_path: Path, options: list[str], message: str
) -> None:
    options = options if "--mean" in options else [*COMMON[4:6], *options]
    done = run_cli("inspect", checkpoint[0], *COMMON[:4], *COMMON[6:], *options, "--out", tmp_path)
    assert done.code == 2
    assert message in done.err


@pytest.mark.parametrize("below", ["", "below"])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    checkpoint: tuple[Path, Path], tmp_path: Path, below: str
) -> None:
    (tmp_path / "file").write_text("mine")
    done = run_cli("inspect", checkpoint[0], *COMMON, "--quick", "--out", tmp_path / "file" / below)
    assert done.code == 2
    assert "no folder can be made there" in done.err
    assert "margins" not in done.err
    assert (tmp_path / "file").read_text() == "mine"


def test_what_was_taken_is_said(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    done = run_cli("inspect", checkpoint[0], *COMMON, "--quick", "--out", tmp_path)
    assert "preprocessing: 32 px, mean 0.5" in done.err


def test_one_output_is_no_classifier() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 1))
    with pytest.raises(InputError, match="a head of 1 output, as for yes or no"):
        Classifier(network, head="1", resolution=SIDE, mean=[0] * 3, std=[1] * 3, architecture="one")


def test_two_classes_are_not_called_chance() -> None:
    """A model that is right three times in four says more than chance does, if it has two classes."""
    notes = inspect_module._notes(halves(), None, None, {}, 0.75, None)
    assert not any("chance" in note for note in notes)
    assert any("chance" in note for note in inspect_module._notes(halves(), None, None, {}, 0.55, None))


def halves() -> Classifier:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 2))
    return Classifier(network, head="1", resolution=SIDE, mean=[0] * 3, std=[1] * 3, architecture="two")


def test_an_internal_repair_that_changes_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_module, "_repaired", lambda classifier, *rest: classifier)
    found = inspect_classifier(model(backdoor=4.0), images(), config(method="calibrated-trigger-inversion"))
    assert found.verdict.score == 0
    assert "No rebuilt trigger does anything else" in found.notes[0]


def test_a_mask_that_turns_nothing_is_no_small_mask() -> None:
    mask = np.full((6, SIDE, SIDE, 1), 0.5, np.float32)
    mask[3] = 0.01
    made = Triggers(
        classes=np.arange(6),
        mask=mask,
        pattern=np.zeros((6, SIDE, SIDE, 3), np.float32),
        success=np.array([1, 1, 1, 0.1, 1, 1], np.float32),
    )
    found = anomalies({"neural-cleanse": made}, 6, images=40)
    assert found["mask-size"].argmax() != 3
    assert found["mask-size"][3] == found["mask-size"].min()


def rebuilt(success: list[float], size: list[int]) -> Triggers:
    """One mask a class, of so many full pixels, that works so often."""
    mask = np.zeros((len(size), SIDE, SIDE, 1), np.float32)
    for row, pixels in enumerate(size):
        mask[row].reshape(-1)[:pixels] = 1
    return Triggers(
        classes=np.arange(len(size)),
        mask=mask,
        pattern=np.zeros((len(size), SIDE, SIDE, 3), np.float32),
        success=np.array(success, np.float32),
    )


def test_masks_of_which_most_do_not_work_say_nothing() -> None:
    sizes = [9, 4, 8, 10, 9]
    few = anomalies({"neural-cleanse": rebuilt([0.3, 0.9, 0.4, 0.6, 0.2], sizes)}, 5, 100)
    assert not few["mask-size"].any()
    assert not few["neural-cleanse"].any()
    most = anomalies({"neural-cleanse": rebuilt([0.9, 0.9, 0.4, 0.6, 0.6], sizes)}, 5, 100)
    assert most["mask-size"].argmax() == 1
    assert most["mask-size"][2] < 0, "its mask does not work, so that it counts as the whole image"


@pytest.mark.parametrize(
    ("success", "says"),
    [([0.99, 0.98, 1.0, 0.99], False), ([0, 0, 0.05, 0], False), ([0.3, 0.4, 0.9, 0.4], True)],
)
def test_universal_changes_without_a_common_norm_say_nothing(success: list[float], says: bool) -> None:
    made = {"universal": rebuilt(success, [1] * 4)}
    found = anomalies(made, 4, 100)["universal"]
    assert found.any() == says
    notes = inspect_module._notes(model(), images(), images(), made, 0.9, None)
    assert any("count as 0 in the score" in note for note in notes) != says


def test_margins_of_many_classes_only_where_they_are_asked_for() -> None:
    seconds: dict[str, float] = {}
    assert set(inspect_module._quick(model(), False, 0, seconds, Silent())) == {"head"}
    assert set(seconds) == {"head"}


def test_classes_by_number_and_names_that_are_there_twice() -> None:
    named = model(names=["tench, Tinca tinca", "crane", "crane", "a", "b", "c"])
    assert parse_classes("0,5", named) == (0, 5)
    assert parse_classes("a,c", named) == (3, 5)
    with pytest.raises(UsageError, match="several classes 'crane'; give their numbers"):
        parse_classes("a,crane", named)
    numbers = model(names=["10", "11", "12", "13", "14", "15"])
    assert parse_classes("11,15", numbers) == (1, 5)


def test_a_quick_alarm_asks_for_a_closer_look_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anything = inspect_module.Threshold(value=-1e9, calibration="a test")
    monkeypatch.setitem(inspect_module.THRESHOLDS, "quick", anything)
    facts = audit(model(), None, config(method="quick"), tmp_path, "m.pt", Silent()).facts
    (advice,) = facts["verdict"]["next"]
    assert advice["command"] == "sanitize inspect m.pt --trusted CLEAN"
    assert "below" not in advice["text"]
