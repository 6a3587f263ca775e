"""Trusted images at the model's resolution, and a model judged on them before anything else is."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import image_bytes, sample, shard
from PIL import Image
from torch import nn

from sanitize.checkpoints import load
from sanitize.checkpoints.classifier import Classifier
from sanitize.checkpoints.load import LoadConfig, load_with_trusted
from sanitize.checkpoints.trusted import TrustedImages, load_trusted, refuse_constant
from sanitize.dynamics import proxy
from sanitize.errors import InputError, UsageError

SIDE = 8


def classifier(classes: int = 3, names: tuple[str, ...] | None = None) -> Classifier:
    """Calls an image by its brightest channel: red 0, green 1, blue 2."""
    head = nn.Linear(3, classes, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(classes, 3))
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    return Classifier(
        network,
        head="2",
        resolution=SIDE,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        architecture="test",
        class_names=names,
    )


def colour(number: int, size: int = 16) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), ((200, 30, 30), (30, 200, 30), (30, 30, 200))[number]).save(stream, "png")
    return stream.getvalue()


def coloured(path: Path, labels: list[str], colours: list[int]) -> str:
    """A shard with an image of each colour and that label."""
    return str(
        shard(
            path,
            [
                {"__key__": f"{i:04d}", "png": colour(number), "cls": label}
                for i, (label, number) in enumerate(zip(labels, colours, strict=True))
            ],
        )
    )


def test_images_and_labels_by_number(tmp_path: Path) -> None:
    shards = coloured(tmp_path / "a.tar", ["0", "1", "02", "0", "1", "2"], [0, 1, 2, 0, 1, 2])
    trusted, notes = load_trusted(shards, "cls", classifier())
    assert trusted.pixels.shape == (6, SIDE, SIDE, 3)
    assert trusted.pixels.dtype == np.uint8
    assert trusted.class_id.tolist() == [0, 1, 2, 0, 1, 2]
    assert trusted.pixels[:, 0, 0].argmax(axis=1).tolist() == [0, 1, 2, 0, 1, 2]
    assert notes == []
    assert refuse_constant(classifier(), trusted) == ["accuracy on the 6 trusted images: 100.0%"]


def test_labels_by_name_in_the_order_of_the_head(tmp_path: Path) -> None:
    shards = coloured(tmp_path / "a.tar", ["red", "blue", "red", "blue"], [0, 2, 0, 2])
    trusted, notes = load_trusted(shards, "cls", classifier(names=("red", "green", "blue")))
    assert trusted.class_id.tolist() == [0, 2, 0, 2]
    assert notes == ["1 of 3 classes have no trusted image"]


def test_numbers_count_as_outputs_where_no_label_is_a_name(tmp_path: Path) -> None:
    named = classifier(names=("red", "green", "blue"))
    shards = coloured(tmp_path / "a.tar", ["0", "2", "0", "2"], [0, 2, 0, 2])
    assert load_trusted(shards, "cls", named)[0].class_id.tolist() == [0, 2, 0, 2]
    swapped = classifier(names=("2", "1", "0"))
    assert load_trusted(shards, "cls", swapped)[0].class_id.tolist() == [2, 0, 2, 0]
    mixed = coloured(tmp_path / "b.tar", ["red", "2", "red", "2"], [0, 2, 0, 2])
    with pytest.raises(
        InputError, match=r"outside the model's head: 2 \(2\); its 3 classes are red, green, blue"
    ):
        load_trusted(mixed, "cls", named)


def test_labels_in_json_and_several_shards(tmp_path: Path) -> None:
    for number in range(2):
        shard(
            tmp_path / f"data-{number}.tar",
            [{"__key__": f"{i}", "png": colour(i), "json": f'{{"label": {{"id": {i}}}}}'} for i in range(3)],
        )
    trusted, _ = load_trusted(str(tmp_path / "data-{0..1}.tar"), "json:label.id", classifier())
    assert trusted.class_id.tolist() == [0, 1, 2, 0, 1, 2]


def test_labels_outside_the_head_are_named_and_counted(tmp_path: Path) -> None:
    labels = ["0", "1", "3", "3", "7", "0", "1"]
    shards = coloured(tmp_path / "a.tar", labels, [0, 1, 2, 2, 2, 0, 1])
    with pytest.raises(
        InputError,
        match=r"3 trusted images have labels outside the model's head: 3 \(2\), 7 \(1\); "
        r"its 3 outputs are 0 to 2\. Give --class-names",
    ):
        load_trusted(shards, "cls", classifier())
    words = coloured(tmp_path / "b.tar", ["cat", "dog", "cat", "dog"], [0, 1, 0, 1])
    with pytest.raises(InputError, match=r"4 trusted images .* cat \(2\), dog \(2\); .* Give --class-names"):
        load_trusted(words, "cls", classifier())


def test_a_label_that_two_outputs_have(tmp_path: Path) -> None:
    shards = coloured(tmp_path / "a.tar", ["crane", "red", "crane", "red"], [1, 0, 1, 0])
    with pytest.raises(InputError, match="two outputs of the model are called crane"):
        load_trusted(shards, "cls", classifier(names=("red", "crane", "crane")))


def test_one_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="all 3 trusted images are of class 1; give images of two classes"):
        load_trusted(coloured(tmp_path / "a.tar", ["1"] * 3, [1] * 3), "cls", classifier())


def test_fewer_than_two_images_a_class_are_refused(tmp_path: Path) -> None:
    shards = coloured(tmp_path / "a.tar", ["0", "0", "1", "2", "2"], [0, 0, 1, 2, 2])
    with pytest.raises(InputError, match=r"1 classes have one trusted image \(1\); two a class"):
        load_trusted(shards, "cls", classifier())


def test_unusable_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    good = [sample(f"{i:03d}", str(i % 2), seed=i) for i in range(4)]
    bad: list[Any] = [
        {"__key__": "no-label", "png": colour(0)},
        {"__key__": "no-image", "cls": "0"},
        {"__key__": "broken", "png": b"\x89PNG nothing", "cls": "0"},
        {"__key__": "two", "png": colour(0), "jpg": image_bytes(0), "cls": "0"},
        {"__key__": "bad", "png": colour(0), "cls": "two\nlines"},
    ]
    trusted, notes = load_trusted(str(shard(tmp_path / "a.tar", [*good, *bad])), "cls", classifier())
    assert len(trusted) == 4
    assert notes[0] == (
        "5 trusted samples were left out (1 bad-label, 1 no-image, 1 no-label, 1 two-images, 1 undecodable)"
    )
    with pytest.raises(InputError, match=r"no sample with an image and a label in \.cls \(.* check --label"):
        load_trusted(str(shard(tmp_path / "b.tar", bad)), "cls", classifier())


def brightness(count: int = 60) -> TrustedImages:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    return TrustedImages(pixels=pixels, class_id=np.arange(count) % 3)


def test_a_model_with_equal_logits_for_all_is_refused() -> None:
    model = classifier()
    with torch.no_grad():
        model.head.weight.zero_()
    with pytest.raises(InputError, match="a constant model: its logits are the same for every trusted image"):
        refuse_constant(model, brightness())


def test_a_model_that_gives_one_class_is_refused() -> None:
    model = classifier(names=("red", "green", "blue"))
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[0.01, 0, 0], [0, 0.01, 0], [0, 0, 0]]))
    model.mean += 10
    model.head.register_parameter("bias", nn.Parameter(torch.tensor([0.0, 50.0, 0.0])))
    with pytest.raises(InputError, match="it calls all 60 trusted images green; check --arch, --mean"):
        refuse_constant(model, brightness())


def test_logits_that_are_no_numbers_are_refused() -> None:
    model = classifier()
    with torch.no_grad():
        model.head.weight.fill_(float("inf"))
    with pytest.raises(InputError, match="not finite on trusted images"):
        refuse_constant(model, brightness())


def test_accuracy_near_chance_is_a_warning() -> None:
    notes = refuse_constant(classifier(), brightness())
    assert notes[0].startswith("accuracy on the 60 trusted images: ")
    assert notes[1].startswith("warning: that is no better than always naming the largest class (33.3%)")


@pytest.mark.parametrize("pooled", [True, False])
def test_the_images_decide_about_the_max_pool_of_a_cifar_stem(tmp_path: Path, pooled: bool) -> None:
    """Weights do not tell; labels are what the network says itself with or without the pool."""
    torch.manual_seed(0)
    network = proxy.build("resnet18", 3, 32).train()
    if not pooled:
        network.maxpool = nn.Identity()
    pictures = [image_bytes(seed, "png", 32) for seed in range(48)]
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures])
    pixels = torch.from_numpy(decoded).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        network((pixels - 0.5) / 0.25)
        network.eval()
        network.fc.bias -= network((pixels - 0.5) / 0.25).mean(dim=0)
        said = network((pixels - 0.5) / 0.25).argmax(dim=1).tolist()
    torch.save(network.state_dict(), tmp_path / "in.pt")
    rows = [
        {"__key__": str(i), "png": p, "cls": str(c)}
        for i, (p, c) in enumerate(zip(pictures, said, strict=True))
    ]
    shards = str(shard(tmp_path / "a.tar", rows))
    config = LoadConfig(
        checkpoint=tmp_path / "in.pt",
        arch="torchvision:resnet18",
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        device="cpu",
    )
    loaded, trusted = load_with_trusted(config, shards, "cls")
    assert len(trusted) == 48
    assert isinstance(loaded.classifier.network.maxpool, nn.MaxPool2d) is pooled
    taken = "with" if pooled else "without"
    assert any(note.startswith(f"taken {taken} max-pool: accuracy") for note in loaded.notes)
    assert "accuracy on the 48 trusted images: 100.0%" in loaded.notes
    assert load.save(loaded, loaded.classifier.network.state_dict(), tmp_path / "out.pt")[0].exists()


def test_a_pipe_needs_permission() -> None:
    with pytest.raises(UsageError, match="--allow-pipe"):
        load_trusted("pipe:cat x.tar", "cls", classifier())


@pytest.mark.parametrize("right", [False, True])
def test_an_attribute_that_weights_do_not_tell_is_settled_by_the_images(right: bool) -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 2)
            self.transform_input = False
            with torch.no_grad():
                self.head.weight.copy_(torch.tensor([[-1.0], [1.0]]))
                self.head.bias.copy_(torch.tensor([0.5, -0.5]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = 1 - x if self.transform_input else x
            return self.head(x.mean(dim=(1, 2, 3))[:, None])

    dark, bright = np.zeros((4, 8, 8, 3), np.uint8), np.full((4, 8, 8, 3), 255, np.uint8)
    classifier = Classifier(
        Either(), head="head", resolution=8, mean=[0] * 3, std=[1] * 3, architecture="either"
    )
    images = TrustedImages(
        pixels=np.concatenate([dark, bright]), class_id=np.repeat([right, not right], 4) * 1
    )
    said = load._settle(classifier, images, "transform_input", {"as it is": False, "turned round": True})
    assert classifier.network.transform_input is right
    assert said.startswith("taken turned round: " if right else "taken as it is: ")
