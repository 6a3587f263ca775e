"""The benchmark on a tiny generated corpus: every cell, its figures, going on, and the three outputs."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from builders import member, sample, shard
from conftest import run_cli
from PIL import Image
from scipy.ndimage import gaussian_filter

from sanitize.attacks.encoding import encode
from sanitize.corpus.pixels import decode
from sanitize.errors import InputError, RunFolderError, UsageError
from sanitize.evaluate import bench as bench_module
from sanitize.evaluate import metrics, tables
from sanitize.evaluate.bench import CONTROLS, bench, load_config
from sanitize.evaluate.images import decode_all, read_encoded
from sanitize.evaluate.retrain import RECIPES, predict, recipe, retrain

CLASSES, SAMPLES = 3, 600
BENCHMARKS = Path(__file__).parent.parent / "docs/benchmarks"


def picture(class_id: int, rng: np.random.Generator, side: int = 16) -> np.ndarray:
    """Stripes of the class's direction over noise: learned in an epoch or two."""
    rows, columns = np.mgrid[0:side, 0:side]
    wave = np.sin((rows, columns, rows + columns)[class_id] * 0.8 + rng.uniform(0, 6))
    values = 128 + 50 * wave[:, :, None] + rng.normal(0, 25, (side, side, 3))
    return values.clip(0, 255).astype(np.uint8)


def write(folder: Path, count: int, first: int) -> Path:
    rng = np.random.default_rng(first)
    pieces = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.fromarray(picture(i % CLASSES, rng)).save(buffer, "png")
        key = f"{first + i:06d}"
        pieces.append(
            member(f"{key}.png", buffer.getvalue()) + member(f"{key}.cls", str(i % CLASSES).encode())
        )
    shard(folder / "data-000.tar", pieces)
    return folder


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONFIG = """
shards = "{folder}/corpus"
trusted = "{folder}/trusted"
test = "{folder}/test"
attacks = ["blend-random:0.1", "single-pixel:0.005"]
seeds = [0]

[scan]
epochs = 3
proxy = "small"
resolution = 16
device = "cpu"

[retrain]
recipe = "small"
epochs = 6

[[method]]
name = "causal-backdoor-defense"

[[method]]
name = "abl"

[[method]]
name = "mahalanobis"
reject = 0.2
"""
RUNS = ("run", "unpoisoned/run")
CELLS = [
    "no defence", "floor", "causal-backdoor-defense", "abl", "mahalanobis (reject 0.2)", "random removal",
    "no poison",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def small_batches() -> Iterator[None]:
    """Twelve steps, which is what batches of 256 come to here, teach nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "small", dataclasses.replace(RECIPES["small"], batch=32))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bench")
    write(made / "corpus", SAMPLES, 0)
    write(made / "trusted", 60, 10_000)
    write(made / "test", 120, 20_000)
    (made / "bench.toml").write_text(CONFIG.format(folder=made))
    return made


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    bench(folder / "bench.toml", folder / "out")
    return folder / "out"


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "bench.json").read_text())
    return found


def test_every_cell_is_measured(finished: Path) -> None:
    cells = {cell["name"]: cell for cell in results(finished)["cells"]}
    assert list(cells) == CELLS
    assert set(CONTROLS) <= set(cells)
    assert cells["floor"]["recall"] == {"blend-random": 1, "single-pixel": 1}
    assert cells["floor"]["clean_lost"] == 0
    assert cells["floor"]["kept"] == SAMPLES - 63
    assert cells["no defence"]["removed_ratio"] == 0
    assert cells["no poison"]["kept"] == SAMPLES
    assert cells["abl"]["removed_ratio"] == pytest.approx(0.15, abs=0.002)
    assert cells["abl"]["decision"]["class_cap"] is None
    # the first method removes nothing, so random removal takes as much as the second
    assert cells["random removal"]["removed_ratio"] == cells["abl"]["removed_ratio"]
    assert cells["mahalanobis (reject 0.2)"]["decision"]["class_cap"] == 0.5
    for cell in cells.values():
        assert cell["clean_accuracy"] > (0.6 if cell["name"] == "causal-backdoor-defense" else 0.8)
        assert set(cell["asr"]) == {"blend-random", "single-pixel"}


def test_all_shards_of_a_benchmark_are_coded_alike(finished: Path) -> None:
    """A large JPEG is reduced by its decoder and a PNG is not, so that a mix would tell them apart."""
    folder = finished / "seed-0"
    for shards in ("trusted", "poisoned/shards", "unpoisoned/shards"):
        names: list[str] = []
        for path in (folder / shards).glob("*.tar"):
            with tarfile.open(path) as tar:
                names += tar.getnames()
        endings = {Path(name).suffix for name in names}
        assert endings == {".png", ".cls"}, shards


def test_a_defence_that_trains_removes_nothing(finished: Path) -> None:
    cell = next(cell for cell in results(finished)["cells"] if cell["name"] == "causal-backdoor-defense")
    assert (
        cell["removed_ratio"] == cell["clean_removed_ratio"] == cell["clean_lost"] == cell["defence_s"] == 0
    )
    assert cell["kept"] == SAMPLES
    assert cell["recall"] == {}
    assert "decision" not in cell


def test_methods_decide_on_the_unpoisoned_corpus_too(finished: Path) -> None:
    cells = {cell["name"]: cell for cell in results(finished)["cells"]}
    assert cells["abl"]["clean_removed_ratio"] == pytest.approx(0.15, abs=0.002)
    assert cells["mahalanobis (reject 0.2)"]["clean_removed_ratio"] == pytest.approx(0.2, abs=0.002)
    assert 0.15 < cells["abl"]["clean_worst_class_lost"] < 0.45
    assert [name for name in CONTROLS if "clean_removed_ratio" in cells[name]] == []
    manifests = [json.loads((finished / "seed-0" / run / "manifest.json").read_text()) for run in RUNS]
    assert manifests[0]["config"]["proxy"] == manifests[1]["config"]["proxy"]
    assert manifests[0]["config"]["corpus"]["trusted"] == manifests[1]["config"]["corpus"]["trusted"]
    names = [{shard["name"] for shard in manifest["shards"]} for manifest in manifests]
    assert names[0] == names[1]


def test_the_attack_is_learned_and_its_removal_shows(finished: Path) -> None:
    """blend-random at 10 %, at twice the strength; measured .96 undefended, .00 with the poison out."""
    found = results(finished)
    asr = {cell["name"]: cell["asr"]["blend-random"]["2"] for cell in found["cells"]}
    assert asr["no defence"] > 0.7
    assert max(asr["floor"], asr["no poison"]) < 0.3
    rows = {row["name"]: row for row in found["summary"]["rows"]}
    # three single pixels among 600 images teach nothing: listed, not averaged
    assert [miss["attack"] for miss in found["summary"]["not_learned"]] == ["single-pixel"]
    assert rows["no defence"]["average"]["mean"] == pytest.approx(asr["no defence"])
    assert rows["floor"]["average_over_floor"]["mean"] == 0


def test_an_attack_is_judged_at_the_strength_at_which_it_works_best() -> None:
    """At triple strength a trigger may fool a clean model as often: success there is no success."""
    asr = {"no defence": {"1": 0.5, "3": 0.7}, "floor": {"1": 0.1, "3": 0.6}, "some": {"1": 0.2, "3": 0.6}}
    cells = [
        {"name": name, "seed": 0, "asr": {"narcissus": by_strength}, "recall": {}, "clean_accuracy": 0.9}
        for name, by_strength in asr.items()
    ]
    found = tables.summarise(cells, list(asr), ["narcissus"])
    assert found["strength"] == {"narcissus": "1"}
    assert found["not_learned"] == []
    assert found["rows"][2]["average_over_floor"]["mean"] == pytest.approx(0.1)


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]


def test_markdown_and_page_say_the_same(finished: Path) -> None:
    text = (finished / "bench.md").read_text()
    assert text == tables.markdown(results(finished))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert "| blend-random ×1 | blend-random ×2 | single-pixel ×1 | average ASR |" in lines[0]
    assert len({line.count("|") for line in lines[: 2 + len(CELLS)]}) == 1
    table = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines[2 : 2 + len(CELLS)]}
    assert "oracle removal (the floor)" in table
    assert "floor" not in table
    column = lines[0].split(" | ").index("removed when nothing is poisoned")
    assert (table["abl"][column], table["no defence"][column]) == ("15.0", "–")
    assert "- single-pixel, seed 0: " in text
    written = (finished / "bench.html").read_text()
    assert written.count("oracle removal (the floor)</t") == 3
    assert '<th scope="col">removed when nothing is poisoned</th>' in written
    reader = Reader()
    reader.feed(written)
    assert reader.links == []
    assert reader.tags.count("table") == 2
    assert "svg" in reader.tags
    assert "script" not in reader.tags


def test_measured_cells_are_not_measured_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = results(finished)
    monkeypatch.setattr(bench_module, "scan_once", None)
    monkeypatch.setattr(bench_module, "retrain", None)
    out = run_cli("bench", finished.parent / "bench.toml", "--out", finished, "--json")
    assert out.code == 0, out.err
    assert json.loads(out.out) == before


def test_a_killed_benchmark_goes_on_with_the_same_figures(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = finished / "seed-0/cells/floor.json"
    before = json.loads(cell.read_text())
    cell.unlink()
    measured = []
    real = bench_module.retrain
    monkeypatch.setattr(bench_module, "retrain", lambda *a, **k: measured.append(1) or real(*a, **k))
    bench(finished.parent / "bench.toml", finished)
    after = json.loads(cell.read_text())
    assert len(measured) == 1
    for timing in ("retrain_s", "defence_s"):
        before.pop(timing), after.pop(timing)
    assert after == before


def test_a_benchmark_of_before_the_unpoisoned_scan_gets_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cells stand; only what a method takes of the clean corpus is measured."""
    old, complete = tmp_path / "out", results(finished)
    shutil.copytree(finished, old)
    shutil.rmtree(old / "seed-0/unpoisoned")
    settings = json.loads((old / "settings.json").read_text())
    assert "scan_unpoisoned" not in settings
    monkeypatch.setattr(bench_module, "retrain", None)
    without = tmp_path / "without.toml"
    without.write_text("scan_unpoisoned = false\n" + (finished.parent / "bench.toml").read_text())
    found = bench(without, old)
    assert not (old / "seed-0/unpoisoned").exists()
    assert not any("clean_removed_ratio" in cell for cell in found["cells"])
    assert "| abl |" in (old / "bench.md").read_text()
    assert bench(finished.parent / "bench.toml", old)["cells"] == complete["cells"]


def test_a_folder_belongs_to_one_benchmark(finished: Path, tmp_path: Path) -> None:
    text = (finished.parent / "bench.toml").read_text()
    other = tmp_path / "other.toml"
    other.write_text(text.replace("blend-random:0.1", "blend-random:0.2"))
    with pytest.raises(RunFolderError, match="another attacks; give another --out"):
        bench(other, finished)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(RunFolderError, match="holds no benchmark"):
        bench(other, tmp_path / "full")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [0]", "seeds = []", "needs attacks, seeds"),
        ("seeds = [0]", "colour = 1", "unexpected keyword argument 'colour'"),
        ('test = "', 'tests = "', "unexpected keyword argument 'tests'"),
        ('name = "abl"', 'name = "abracadabra"', "expected one of abl"),
        ("reject = 0.2", "reject = 2", "expected between 0 and 1"),
        ("blend-random:0.1", "nets:0.1", "no such attack"),
        ("epochs = 3", "epochs = 1", "expected 3 to 1000"),
        (
            'name = "causal-backdoor-defense"',
            'name = "causal-backdoor-defense"\nreject = 0.1',
            "removes nothing, it trains a model of its own: take alpha, reject and class_cap out",
        ),
    ],
)
def test_settings_are_checked_before_any_work(
    folder: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "bench.toml"
    path.write_text(CONFIG.format(folder=folder).replace(old, new))
    with pytest.raises(UsageError, match=message):
        load_config(path)


def test_random_removal_needs_a_share_where_no_method_removes_anything(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench.toml"
    path.write_text(CONFIG.format(folder=folder).split('[[method]]\nname = "abl"')[0])
    with pytest.raises(UsageError, match=r"set random_reject = 0\.15"):
        load_config(path)
    path.write_text("random_reject = 0.3\n" + path.read_text())
    assert load_config(path).random_reject == 0.3


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.toml")), ids=lambda path: path.stem)
def test_our_benchmarks_are_ones(path: Path) -> None:
    config = load_config(path)
    if path.stem == "judged-others":
        assert not set(config.attacks) & set(load_config(BENCHMARKS / "badloss7.toml").attacks)
        assert len(config.seeds) >= 3
        return
    seven = path.stem.startswith("badloss7")
    assert len(config.attacks) == (7 if seven else 1)
    assert seven or path.stem == f"single-{config.attacks[0].split(':')[0]}"
    assert config.seeds == (0, 1, 2)
    if path.stem != "badloss7-slow":
        known = load_config(BENCHMARKS / "badloss7.toml").methods
        assert config.methods == (known if seven else known[:2])


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give the TOML file"):
        load_config(tmp_path / "nowhere.toml")
    (tmp_path / "x.toml").write_text("shards = [")
    with pytest.raises(InputError, match="not valid TOML"):
        load_config(tmp_path / "x.toml")


def test_metrics_by_hand() -> None:
    predicted = np.array([1, 1, 0, 2, 1])
    true = np.array([1, 0, 0, 2, 2])
    assert metrics.clean_accuracy(predicted, true) == 0.6
    # four samples are not of class 1, two of them are given it
    assert metrics.attack_success_rate(predicted, true, 1) == 0.5
    with pytest.raises(ValueError, match="of another class"):
        metrics.attack_success_rate(predicted, np.ones(5), 1)
    assert metrics.learned(0.5, 0.2)
    assert not metrics.learned(0.49, 0.2)
    flagged = np.array([True, False, True, False, True])
    attack = np.array(["a", "a", None, None, None], object)
    found = metrics.removal(flagged, attack, np.array([0, 0, 0, 0, 1]))
    assert found == {
        "removed_ratio": 0.6,
        "recall": {"a": 0.5},
        "clean_lost": pytest.approx(2 / 3),
        "worst_class_lost": 1.0,
    }


def test_test_images_are_stamped_at_their_own_size(folder: Path, tmp_path: Path) -> None:
    encoded = read_encoded(str(folder / "test"), "cls", ["0", "1", "2"], tmp_path)
    assert len(encoded.files) == 120
    clean, class_id = decode_all(encoded, 8)
    stamped, again = decode_all(encoded, 8, "badnets", None, 1.0)
    assert clean.shape == (120, 8, 8, 3)
    np.testing.assert_array_equal(class_id, np.arange(120) % 3)
    np.testing.assert_array_equal(class_id, again)
    changed = (clean != stamped).any(axis=(0, 3))
    assert changed[0, 0]
    assert not changed[2:, 2:].any()
    with pytest.raises(InputError, match="one of the labels"):
        read_encoded(str(folder / "test"), "cls", ["cat"], tmp_path)


def tables_of(shards: Path) -> set[tuple[int, ...]]:
    """Quantisation tables of the JPEGs in the shards, which stand for their quality."""
    found = set()
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if not name.endswith(".cls"):
                    content = tar.extractfile(name)
                    assert content is not None
                    with Image.open(io.BytesIO(content.read())) as image:
                        found.add(tuple(image.quantization[0]))  # type: ignore[attr-defined]
    return found


def test_a_jpeg_corpus_has_jpeg_everywhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is poisoned, trusted, clean and tested has all been through the same loss."""
    path, out = tmp_path / "bench.toml", tmp_path / "out"
    text = CONFIG.format(folder=folder).replace("epochs = 6", "epochs = 1")
    text = text.split("[[method]]")[0] + '[[method]]\nname = "abl"\n'
    path.write_text('image_format = "jpg"\nquality = 60\n' + text)
    trained, tested = [], []
    train, guess = bench_module.retrain, bench_module.predict
    monkeypatch.setattr(bench_module, "retrain", lambda x, *a, **k: trained.append(x) or train(x, *a, **k))
    monkeypatch.setattr(bench_module, "predict", lambda m, x: tested.append(x) or guess(m, x))
    bench(path, out)
    seed = out / "seed-0"
    of_poisoned = tables_of(seed / "poisoned/shards")
    assert len(of_poisoned) == 1
    assert tables_of(seed / "trusted") == tables_of(seed / "unpoisoned/shards") == of_poisoned
    # the last model is that of the corpus without poison, and the last images are the clean test set
    scanned = np.load(seed / "unpoisoned/run/pixels/pixels.npy")
    np.testing.assert_array_equal(trained[-1], scanned[:SAMPLES])
    encoded = read_encoded(str(folder / "test"), "cls", ["0", "1", "2"], tmp_path)
    np.testing.assert_array_equal(tested[-1], decode_all(encoded, 16, jpeg_quality=60)[0])
    assert (tested[-1] != decode_all(encoded, 16)[0]).mean() > 0.5


def test_stamped_test_images_are_encoded_after_stamping(folder: Path, tmp_path: Path) -> None:
    encoded = read_encoded(str(folder / "test"), "cls", ["0", "1", "2"], tmp_path)
    stamped, _ = decode_all(encoded, 16, "badnets")
    lossy, _ = decode_all(encoded, 16, "badnets", jpeg_quality=30)
    by_hand = decode(encode(stamped[7], "jpg", 30), None)
    np.testing.assert_array_equal(lossy[7], by_hand)
    assert (lossy[7] != stamped[7]).any()


def test_rewritten_shards_keep_keys_and_labels(tmp_path: Path) -> None:
    tar = b"".join([sample("a", "3", size=32), sample("b", "4", extension="png", size=32)])
    broken = member("c.jpg", b"no image") + member("c.cls", b"5")
    shard(tmp_path / "in/one.tar", [tar])
    (tmp_path / "in/two.tar.gz").write_bytes(gzip.compress(broken + bytes(1024)))
    load(BENCHMARKS / "resample_shards.py").main([str(tmp_path / "in"), str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    with tarfile.open(tmp_path / "out/one.tar") as made:
        contents = {name: made.extractfile(name).read() for name in made.getnames()}  # type: ignore[union-attr]
    assert list(contents) == ["a.png", "a.cls", "b.png", "b.cls"]
    assert (contents["a.cls"], contents["b.cls"]) == (b"3", b"4")
    assert decode(contents["a.png"], None).shape == (27, 27, 3)
    with tarfile.open(tmp_path / "out/two.tar.gz.tar") as made:
        assert made.getnames() == ["c.jpg", "c.cls"]
        assert made.extractfile("c.jpg").read() == b"no image"  # type: ignore[union-attr]


def test_resampling_evens_out_the_jpeg_grid() -> None:
    """Largest mean second difference along rows over its average: 1.27 before, 1.09 after (to 1.10)."""
    resampled = load(BENCHMARKS / "resample_shards.py").resampled
    smooth = gaussian_filter(np.random.default_rng(0).normal(0, 280, (300, 32, 32, 3)), (0, 1.5, 1.5, 0))
    images = (128 + smooth).clip(0, 255).astype(np.uint8)
    coded = [decode(encode(pixels, "jpg", 75), None) for pixels in images]
    assert unevenness(coded) > 1.2
    assert unevenness([resampled(pixels) for pixels in coded]) < 1.15


def unevenness(images: list[np.ndarray]) -> float:
    pixels = np.stack(images).astype(float).mean(axis=3)
    bend = np.abs(np.diff(pixels, 2, axis=2)).mean(axis=(0, 1))[3:-3]
    return float(bend.max() / bend.mean())


def test_recipes_train_and_repeat() -> None:
    rng = np.random.default_rng(0)
    images = np.stack([picture(i % CLASSES, rng) for i in range(120)])
    labels = np.arange(120) % CLASSES
    # the paper's crops and cosine on a small network
    chosen = recipe("small", 6)
    cropped = dataclasses.replace(chosen, schedule="cosine", crop=1, batch=32)
    for variant in (chosen, cropped, dataclasses.replace(recipe("small-sgd", 6), batch=32)):
        first, second = (retrain(images, labels, CLASSES, variant, seed=3, device="cpu") for _ in range(2))
        guesses = predict(first, images)
        np.testing.assert_array_equal(guesses, predict(second, images))
        assert metrics.clean_accuracy(guesses, labels) > 0.6
    assert recipe("badloss-paper") == RECIPES["badloss-paper"]
    assert RECIPES["badloss-paper"].network == "resnet50"
    unpooled = dataclasses.replace(recipe("resnet18-sgd", 1), batch=4)
    network = retrain(images[:4], labels[:4], CLASSES, unpooled, seed=0, device="cpu").network
    assert not any(isinstance(part, torch.nn.MaxPool2d) for part in network.modules())
    with pytest.raises(UsageError, match=r"retrain\.recipe large: expected auto, small"):
        recipe("large")
    with pytest.raises(UsageError, match="1 samples are left"):
        retrain(images[:1], labels[:1], CLASSES, chosen, seed=0, device="cpu")
