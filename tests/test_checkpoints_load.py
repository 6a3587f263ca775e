"""From a file and options to a classifier and back; folders of transformers and open_clip; no network."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint_files import same
from torch import nn
from torchvision import models

from sanitize.checkpoints import architectures, load
from sanitize.checkpoints.load import LoadConfig, Loaded, load_classifier, read_class_names
from sanitize.errors import InputError, UsageError

SMALL = {"arch": "small_networks:make", "resolution": 16}
FACTORY = """
from torch import nn

def make(num_classes=4):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, num_classes),
    )

def fixed():
    return make(5)

def conv_head(num_classes=4):
    return nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def unlike():
    return {"no": "network"}
"""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a checkpoint names, nothing is fetched."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module", autouse=True)
def small_networks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A user's module with factories, on the path."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "small_networks.py").write_text(FACTORY)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("small_networks", None)


def small(classes: int = 4, seed: int = 0) -> nn.Module:
    import small_networks

    torch.manual_seed(seed)
    network: nn.Module = small_networks.make(classes)
    return network.eval()


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def loaded(path: Path, **options: Any) -> Loaded:
    return load_classifier(LoadConfig(checkpoint=path, **{"device": "cpu", **options}))


def images(resolution: int) -> torch.Tensor:
    return torch.rand(2, 3, resolution, resolution, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def agrees(found: Loaded, network: nn.Module) -> bool:
    """Whether the classifier is that network after its preprocessing."""
    pixels = images(found.classifier.resolution)
    normal = (pixels - found.classifier.mean) / found.classifier.std
    return torch.allclose(found.classifier(pixels), network.eval()(normal), atol=1e-5)


# --- architectures ------------------------------------------------------------------------------------


def test_auto_finds_a_torchvision_network_and_says_so(tmp_path: Path) -> None:
    network = models.resnet18(num_classes=7)
    found = loaded(saved(tmp_path / "in.pt", {"state_dict": network.state_dict()}))
    assert found.classifier.architecture == "torchvision:resnet18"
    assert (found.classifier.head_name, found.classifier.classes) == ("fc", 7)
    assert (found.classifier.resolution, found.classifier.class_names) == (224, None)
    assert agrees(found, network)
    assert found.notes[0].startswith("--arch auto took torchvision:resnet18, ")
    assert "preprocessing: 224 px, mean 0.485, 0.456, 0.406" in found.notes[1]
    assert found.notes[2] == "the weights are those under state_dict in in.pt"


def test_networks_of_other_families_fit_themselves_alone() -> None:
    names = ("regnet_y_400mf", "mobilenet_v3_small", "efficientnet_b0", "vit_b_32", "googlenet", "vgg11_bn")
    for name in names:
        shapes = {f"module.{key}": shape for key, shape in skeleton(name, 5).items()}
        fits = {other: architectures._skeleton_fit(other, shapes) for other in names}
        assert [other for other, fit in fits.items() if not fit.mismatches] == [name]
        assert (fits[name].prefix, fits[name].classes) == ("module.", 5)


def skeleton(name: str, classes: int) -> dict[str, tuple[int, ...]]:
    more = {"init_weights": False} if name == "googlenet" else {}
    with architectures._OnMeta():
        network = models.get_model(name, weights=None, num_classes=classes, **more)
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def test_a_skeleton_has_the_shapes_of_the_network() -> None:
    real = models.regnet_y_400mf(num_classes=5).state_dict()
    assert skeleton("regnet_y_400mf", 5) == {name: tuple(value.shape) for name, value in real.items()}


def test_several_networks_that_fit_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Max-pools and strides have no weights: networks that differ in them alone cannot be told apart."""
    monkeypatch.setattr(models, "list_models", lambda module: ["resnet18", "alias"])
    monkeypatch.setattr(
        architectures,
        "_skeleton_fit",
        lambda name, shapes: architectures.compare(skeleton("resnet18", 1013), shapes),
    )
    found = architectures.find("auto", skeleton("resnet18", 3))
    assert "took torchvision:resnet18, " in found.notes[0]
    assert found.notes[0].endswith("; alias would fit as well")


def test_the_cifar_stem_of_a_resnet(tmp_path: Path) -> None:
    network = models.resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    path = saved(tmp_path / "in.pt", {"net": {f"module.{k}": v for k, v in network.state_dict().items()}})
    for arch in ("auto", "torchvision:resnet18"):
        found = loaded(path, arch=arch, mean=(0.5, 0.5, 0.4), std=(0.2, 0.2, 0.2))
        assert found.classifier.resolution == 32
        assert "resnet18 with a 3×3 stem of stride 1, as for CIFAR" in found.notes
        assert agrees(found, network)


def test_a_vision_transformer_for_larger_images(tmp_path: Path) -> None:
    shapes = skeleton("vit_b_32", 3)
    shapes["encoder.pos_embedding"] = (1, 145, 768)
    found = architectures.find("torchvision:vit_b_32", shapes)
    assert found.preprocessing is not None
    assert found.preprocessing.resolution == 384


def test_nothing_fits_and_the_closest_are_named(tmp_path: Path) -> None:
    state = dict(models.resnet18(num_classes=3).state_dict())
    del state["layer4.1.bn2.running_var"]
    state["extra"] = torch.ones(1)
    with pytest.raises(
        InputError,
        match=r"no torchvision classifier .* --arch timm:NAME.*Closest: torchvision:resnet18 "
        r"\(missing: layer4\.1\.bn2\.running_var; unexpected: extra\)",
    ):
        loaded(saved(tmp_path / "in.pt", state))


def test_nothing_is_even_close(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"factory\. The checkpoint's first names: 0\.weight, 0\.bias, 1\.weight"
    ):
        loaded(saved(tmp_path / "in.pt", small().state_dict()))


def test_a_factory(tmp_path: Path) -> None:
    network = small(3)
    path = saved(tmp_path / "in.pt", network.state_dict())
    found = loaded(path, **SMALL, class_names=("ant", "bee", "cat"))
    assert (found.classifier.head_name, found.classifier.classes) == ("7", 3)
    assert found.classifier.architecture == "small_networks:make"
    assert found.classifier.label(1) == "bee"
    assert agrees(found, network)
    assert "from --resolution, the rest ImageNet's constants, for want of others" in found.notes[0]


def test_a_factory_that_takes_no_class_count(tmp_path: Path) -> None:
    path = saved(tmp_path / "in.pt", small(5).state_dict())
    assert loaded(path, arch="small_networks:fixed", resolution=16).classifier.classes == 5
    wrong = saved(tmp_path / "wrong.pt", small(6).state_dict())
    with pytest.raises(InputError, match=r"other shape: 7\.weight \(6, 8\), not \(5, 8\), 7\.bias"):
        loaded(wrong, arch="small_networks:fixed", resolution=16)


def test_the_project_s_own_small_network(tmp_path: Path) -> None:
    from sanitize.dynamics import proxy

    network = proxy.small(6)
    path = saved(tmp_path / "in.pt", network.state_dict())
    found = loaded(path, arch="sanitize.dynamics.proxy:small", resolution=32)
    assert found.classifier.classes == 6
    assert agrees(found, network)


def test_a_timm_network_brings_its_preprocessing(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    found = loaded(saved(tmp_path / "in.pt", network.state_dict()), arch="timm:vit_tiny_patch16_224")
    assert (found.classifier.head_name, found.classifier.classes) == ("head", 3)
    assert found.classifier.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert agrees(found, network)
    with pytest.raises(UsageError, match="timm has no such network; did you mean"):
        loaded(tmp_path / "in.pt", arch="timm:vit_tiny_patch16")
    with pytest.raises(UsageError, match="timm has no such network"):
        loaded(tmp_path / "in.pt", arch="timm:hf-hub:somebody/something")


def test_a_wrong_architecture_names_the_first_mismatches(tmp_path: Path) -> None:
    path = saved(tmp_path / "in.pt", small().state_dict())
    with pytest.raises(
        InputError,
        match=r"does not fit --arch torchvision:resnet18: missing: conv1\.weight, .* and \d+ more; "
        r"unexpected: 0\.weight, 0\.bias, 1\.weight, 1\.bias, 1\.running_mean and \d+ more",
    ):
        loaded(path, arch="torchvision:resnet18")


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    path = saved(tmp_path / "in.pt", small().state_dict())
    wrong = {
        "torchvision:resnet19": "no such classifier; did you mean resnet18",
        "torchvision:": "expected auto, torchvision:NAME",
        "resnet18": "expected auto, torchvision:NAME",
        "no.such.module:make": "No module named 'no'; expected .* PYTHONPATH",
        "small_networks:nothing": "no attribute 'nothing'",
        "small_networks:unlike": "gave a dict, not a torch.nn.Module",
        "small_networks:make": "give --resolution",
        "sys:path": "is not a callable object",
        ".relative:make": "expected .* PYTHONPATH",
        "torch.nn:Linear": "cannot be called without in_features, out_features; write a function",
        "timm:resnet18.a:b": "timm has no such network",
    }
    for arch, match in wrong.items():
        with pytest.raises(UsageError, match=match):
            loaded(path, arch=arch)
    for options in (
        {"mean": (0.5, 0.5)},
        {"mean": (120.0, 110.0, 100.0)},
        {"mean": (0.5, float("nan"), 0.5)},
        {"std": (0.0, 0.1, 0.1)},
        {"std": (0.1, float("inf"), 0.1)},
        {"resolution": 2},
        {"prompts": ("a photo",)},
        {"prompts": ()},
        {"device": "tpu"},
    ):
        with pytest.raises(UsageError, match=f"--{min(options).removesuffix('s')}"):
            loaded(path, **options)


def test_a_network_without_a_linear_head_is_refused(tmp_path: Path) -> None:
    import small_networks

    path = saved(tmp_path / "in.pt", small_networks.conv_head().state_dict())
    with pytest.raises(InputError, match="not the output of one linear layer"):
        loaded(path, arch="small_networks:conv_head", resolution=16)


def test_a_wrong_number_of_class_names_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "in.pt", small(4).state_dict())
    with pytest.raises(InputError, match="2 class names for a head of 4 classes"):
        loaded(path, **SMALL, class_names=("a", "b"))


def test_images_that_the_network_cannot_take(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    import timm

    network = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    path = saved(tmp_path / "in.pt", network.state_dict())
    with pytest.raises(InputError, match=r"cannot take RGB images of 100 px .* --resolution"):
        loaded(path, arch="timm:vit_tiny_patch16_224", resolution=100)


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "in.pt", small().state_dict())
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    loaded(path, **SMALL)
    assert torch.equal(torch.rand(3), wanted)


def test_counters_that_old_checkpoints_lack(tmp_path: Path) -> None:
    state = {k: v for k, v in small().state_dict().items() if not k.endswith("num_batches_tracked")}
    found = loaded(saved(tmp_path / "in.pt", state), **SMALL)
    out = load.save(found, found.classifier.network.state_dict(), tmp_path / "out.pt")[0]
    assert list(torch.load(out, weights_only=True)) == list(state)


# --- saving -------------------------------------------------------------------------------------------


def test_a_repaired_network_goes_back_where_it_came_from(tmp_path: Path) -> None:
    state = {
        f"model.{name}": v.half() if v.is_floating_point() else v for name, v in small().state_dict().items()
    }
    content = {"state_dict": state, "epoch": 4}
    found = loaded(saved(tmp_path / "in.ckpt", content), **SMALL)
    assert 'the names begin with "model.", which is put back on saving' in found.notes
    assert "stored in float16, worked on in float32, saved as stored" in found.notes
    unchanged = load.save(found, found.classifier.network.state_dict(), tmp_path / "same.ckpt")
    assert same(torch.load(unchanged[0], weights_only=True), content)

    tuned = found.classifier.clone()
    with torch.no_grad():
        tuned.head.bias.fill_(0.25)
    out, bare = load.save(found, tuned.network.state_dict(), tmp_path / "out.ckpt")
    content["state_dict"]["model.7.bias"] = torch.full((4,), 0.25).half()
    assert same(torch.load(out, weights_only=True), content)
    assert list(loaded(bare, **SMALL).file.tensors) != []
    again = loaded(out, **SMALL).classifier
    assert torch.equal(again(images(16)), loaded(bare, **SMALL).classifier(images(16)))
    assert torch.allclose(again(images(16)), tuned(images(16)), atol=1e-3)


def test_an_output_is_refused_before_the_work(tmp_path: Path) -> None:
    found = loaded(saved(tmp_path / "in.pt", small().state_dict()), **SMALL)
    load.check_output(found, tmp_path / "out.pth")
    with pytest.raises(UsageError, match="is a file, not a folder"):
        load.check_output(found, tmp_path / "in.pt" / "deep" / "out.pt")
    for name in ("in.pt", "out.safetensors"):
        with pytest.raises(UsageError):
            load.check_output(found, tmp_path / name)
    (tmp_path / "out.safetensors").touch()
    with pytest.raises(UsageError, match=r"out\.safetensors is there, and would be replaced"):
        load.check_output(found, tmp_path / "out.pt")


# --- class names --------------------------------------------------------------------------------------


def test_class_names(tmp_path: Path) -> None:
    assert read_class_names("cat, dog,bird") == ("cat", "dog", "bird")
    (tmp_path / "names.txt").write_text("tench, fish\n\ngoldfish\n")
    with pytest.raises(UsageError, match="an empty name"):
        read_class_names(str(tmp_path / "names.txt"))
    (tmp_path / "names.txt").write_text("tench, fish\ngoldfish\n")
    assert read_class_names(str(tmp_path / "names.txt")) == ("tench, fish", "goldfish")
    for text, match in (("a,,b", "empty name"), ("a,b,a", "'a' is there twice"), ("names", "no such file")):
        with pytest.raises(UsageError, match=match):
            read_class_names(text)


# --- transformers -------------------------------------------------------------------------------------


def hf_folder(
    folder: Path, weights: str = "model.safetensors", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A tiny vision transformer as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        id2label={0: "cat", 1: "dog", 2: "bird"},
        label2id={"cat": 0, "dog": 1, "bird": 2},
    )
    network: nn.Module = transformers.ViTForImageClassification(config).eval()
    network.to(dtype).save_pretrained(folder)
    if weights != "model.safetensors":
        from safetensors.torch import load_file

        torch.save(load_file(folder / "model.safetensors"), folder / weights)
        (folder / "model.safetensors").unlink()
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2] * 3, "size": {"height": 32, "width": 32}}
        )
    )
    return network.float()


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_transformers_folder(tmp_path: Path, weights: str) -> None:
    folder = tmp_path / "model"
    network = hf_folder(folder, weights, torch.float16)
    (folder / "modeling_own.py").write_text("raise SystemExit")
    found = loaded(folder)
    assert found.classifier.class_names == ["cat", "dog", "bird"]
    assert (found.classifier.head_name, found.classifier.resolution) == ("classifier", 32)
    assert found.classifier.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    pixels = images(32)
    normal = (pixels - found.classifier.mean) / found.classifier.std
    copied = found.classifier.clone()
    with torch.no_grad():
        assert torch.allclose(found.classifier(pixels), network(normal).logits, atol=1e-5)
        copied.head.weight.zero_()
        assert torch.equal(copied(pixels), copied.head.bias.expand(2, 3))
        assert not torch.equal(found.classifier(pixels), copied(pixels))

    out = tmp_path / "out"
    written = load.save(found, found.classifier.network.state_dict(), out)
    assert written[0] == out / weights
    before, after = loaded(folder).file, loaded(out).file
    if weights == "model.safetensors":
        assert (out / weights).read_bytes() == (folder / weights).read_bytes()
    assert all(
        torch.equal(before.tensors[k], v) and v.dtype == torch.float16 for k, v in after.tensors.items()
    )
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert not (out / "modeling_own.py").exists()

    load.save(found, copied.network.state_dict(), out)
    assert torch.equal(loaded(out).classifier.head.weight, torch.zeros(3, 16))
    with pytest.raises(UsageError, match="own folder"):
        load.save(found, copied.network.state_dict(), folder)


def test_a_file_beside_its_transformers_folder(tmp_path: Path) -> None:
    hf_folder(tmp_path / "model")
    found = loaded(tmp_path / "model" / "model.safetensors", arch=f"hf:{tmp_path / 'model'}")
    assert found.folder is None
    assert load.save(found, {}, tmp_path / "out.safetensors") == [tmp_path / "out.safetensors"]


def test_transformers_folders_that_cannot_be_used(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    hf_folder(folder)
    config = json.loads((folder / "config.json").read_text())

    def with_config(match: str, **changes: Any) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(InputError, match=match):
            loaded(folder)

    with_config("is quantised", quantization_config={"load_in_4bit": True})
    with_config("without running its code", model_type="own", auto_map={"AutoConfig": "own.Config"})
    with_config("cannot build an image classifier", model_type="bert")
    with_config(r"does not fit ViTForImageClassification: missing: vit\.layers", num_hidden_layers=2)
    with_config(r"other shape: .*intermediate|other shape: .*fc1", intermediate_size=64)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        loaded(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"neither config\.json nor open_clip_config\.json"):
        loaded(folder)
    with pytest.raises(InputError, match=r"holds no config\.json"):
        loaded(folder / "model.safetensors", arch=f"hf:{folder}")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="says itself what it is"):
        loaded(folder, arch="torchvision:resnet18")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        loaded(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="weights in several files"):
        loaded(folder)


def test_a_timm_folder_of_transformers_opens_no_other_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    pytest.importorskip("transformers")
    network = timm.create_model("resnet10t", num_classes=4)
    folder = tmp_path / "model"
    folder.mkdir()
    state = {f"timm_model.{name}": value for name, value in network.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    saved(tmp_path / "other.pt", network.state_dict())

    def with_config(**changes: Any) -> None:
        config = {"model_type": "timm_wrapper", "architecture": "resnet10t", "num_classes": 4, **changes}
        (folder / "config.json").write_text(json.dumps(config))

    with_config()
    assert loaded(folder, resolution=32).classifier.classes == 4
    with_config(pretrained_cfg={"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 48, 48]})
    found = loaded(folder).classifier
    assert found.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert (found.std.flatten()[0].item(), found.resolution) == (pytest.approx(0.4), 48)
    for wrong in ({"mean": None}, {"std": [0, 0, 0]}, {"mean": ["x"] * 3}, {"input_size": None}):
        good = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 48, 48]}
        with_config(pretrained_cfg={**good, **wrong})
        with pytest.raises(InputError, match=r"pretrained_cfg of .*config.json is malformed"):
            loaded(folder)
    with_config(model_args={"checkpoint_path": str(tmp_path / "other.pt")})
    with pytest.raises(InputError, match=r"model_args \(checkpoint_path\) are not passed on"):
        loaded(folder, resolution=32)
    for name in (f"local-dir:{folder}", "hf-hub:someone/something"):
        with_config(architecture=name)
        with pytest.raises(InputError, match="timm has no network"):
            loaded(folder, resolution=32)


def test_rescaling_is_worked_into_the_normalisation(tmp_path: Path) -> None:
    """EfficientNet of transformers: pixels times 1/127.5, minus 1."""
    folder = tmp_path / "model"
    hf_folder(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "rescale_factor": 1 / 127.5,
                "rescale_offset": True,
                "image_mean": [0.1] * 3,
                "image_std": [2] * 3,
            }
        )
    )
    classifier = loaded(folder).classifier
    wanted = (images(32) * 255 / 127.5 - 1 - 0.1) / 2
    assert torch.allclose((images(32) - classifier.mean) / classifier.std, wanted, atol=1e-6)


# --- CLIP ---------------------------------------------------------------------------------------------

NAMES = ("cat", "dog", "bird")


def clip_folder(folder: Path) -> Any:
    """A tiny CLIP and its tokeniser, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers import models as token_models

    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "a", "photo", "of", "drawing", *NAMES]
    tokenizer = Tokenizer(
        token_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    )
    wrapped.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.CLIPConfig(
        text_config={
            **sizes,
            "vocab_size": len(words),
            "max_position_embeddings": 12,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "crop_size": 32, "do_center_crop": True}
        )
    )
    return model, wrapped


def test_a_clip_of_transformers_classifies_as_it_does_itself(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    model, tokenizer = clip_folder(folder)
    found = loaded(folder, class_names=NAMES)
    pixels = images(32)
    tokens = tokenizer([f"a photo of a {name}" for name in NAMES], return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted = model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=(pixels - 0.5) / 0.25,
        ).logits_per_image
    assert torch.allclose(found.classifier(pixels), wanted, atol=1e-4)
    logits, features = found.classifier.embed(pixels)
    assert torch.allclose(features.norm(dim=1), torch.ones(2))
    assert torch.allclose(features @ found.classifier.head.weight.T, logits, atol=1e-4)
    assert "zero-shot: CLIPModel of transformers, 3 class names" in found.notes[0]


def test_a_tuned_clip_is_written_back_whole(tmp_path: Path) -> None:
    """The image tower's tensors change, the head is none of them, the text tower keeps its bits."""
    folder, out = tmp_path / "clip", tmp_path / "out"
    clip_folder(folder)
    found = loaded(folder, class_names=NAMES)
    load.save(found, found.classifier.network.state_dict(), out)
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

    tuned = found.classifier.clone()
    assert not any(name.startswith("network.head") for name, _ in tuned.named_parameters())
    assert all(p.requires_grad for p in tuned.parameters())
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    tuned(images(32)).square().sum().backward()
    optimizer.step()
    load.save(found, tuned.network.state_dict(), out)
    again = loaded(out, class_names=NAMES)
    assert torch.allclose(again.classifier(images(32)), tuned(images(32)), atol=1e-4)
    changed = {k for k, v in again.file.tensors.items() if not torch.equal(v, found.file.tensors[k])}
    assert changed
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in changed)


def test_several_prompts_are_averaged(tmp_path: Path) -> None:
    clip_folder(tmp_path)
    both = loaded(
        tmp_path, class_names=NAMES, prompts=("a photo of a {}", "a drawing of a {}")
    ).classifier.head.weight
    one, other = (
        loaded(tmp_path, class_names=NAMES, prompts=(prompt,)).classifier.head.weight
        for prompt in ("a photo of a {}", "a drawing of a {}")
    )
    middle = nn.functional.normalize(one + other, dim=1)
    assert torch.allclose(nn.functional.normalize(both, dim=1), middle, atol=1e-5)
    assert torch.allclose(both.norm(dim=1), one.norm(dim=1), atol=1e-4)


def test_clip_folders_that_cannot_be_used(tmp_path: Path) -> None:
    clip_folder(tmp_path)
    with pytest.raises(UsageError, match="give --class-names"):
        loaded(tmp_path)
    for path in [*tmp_path.glob("token*"), *tmp_path.glob("special*")]:
        path.unlink()
    with pytest.raises(InputError, match="holds no tokeniser"):
        loaded(tmp_path, class_names=NAMES)


def open_clip_folder(folder: Path, **text: Any) -> Any:
    """A tiny open_clip model with the tokeniser that is built into the package."""
    open_clip = pytest.importorskip("open_clip")
    config = {
        "model_cfg": {
            "embed_dim": 8,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
            "text_cfg": {
                "context_length": 16,
                "vocab_size": 49408,
                "width": 64,
                "heads": 1,
                "layers": 1,
                **text,
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    }
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False).eval()
    from safetensors.torch import save_file

    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def test_an_open_clip_folder(tmp_path: Path) -> None:
    folder, out = tmp_path / "clip", tmp_path / "out"
    model = open_clip_folder(folder)
    import open_clip

    found = loaded(folder, class_names=NAMES)
    pixels = images(32)
    with torch.no_grad():
        text = model.encode_text(
            open_clip.get_tokenizer(f"local-dir:{folder}")([f"a photo of a {name}" for name in NAMES]),
            normalize=True,
        )
        image = model.encode_image((pixels - 0.5) / 0.25, normalize=True)
        wanted = model.logit_scale.exp() * image @ text.T
    assert found.classifier.resolution == 32
    assert torch.allclose(found.classifier(pixels), wanted, atol=1e-4)

    load.save(found, found.classifier.network.state_dict(), out)
    name = "open_clip_model.safetensors"
    assert (out / name).read_bytes() == (folder / name).read_bytes()
    tuned = found.classifier.clone()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(0.9)
    load.save(found, tuned.network.state_dict(), out)
    again = loaded(out, class_names=NAMES)
    assert torch.allclose(again.classifier(pixels), tuned(pixels), atol=1e-4)
    assert all(
        torch.equal(v, found.file.tensors[k]) is not k.startswith("visual.")
        for k, v in again.file.tensors.items()
        if not k.endswith("bias")  # zeros stay zeros
    )


def test_open_clip_folders_that_would_fetch_or_run_something(tmp_path: Path) -> None:
    open_clip_folder(tmp_path)
    path = tmp_path / "open_clip_config.json"
    config = json.loads(path.read_text())

    def with_config(match: str, part: str, **changes: Any) -> None:
        model = {**config["model_cfg"], part: {**config["model_cfg"][part], **changes}}
        path.write_text(json.dumps({"model_cfg": model}))
        with pytest.raises(InputError, match=match):
            loaded(tmp_path, class_names=NAMES)

    with_config("text tower somebody/text would be fetched", "text_cfg", hf_model_name="somebody/text")
    with_config("timm has no network hf-hub:x/y", "vision_cfg", timm_model_name="hf-hub:x/y")
    with_config("asks for trust_remote_code", "text_cfg", tokenizer_kwargs={"trust_remote_code": True})
    with_config(r"holds no tokeniser .* put that of xlm into it", "text_cfg", hf_tokenizer_name="xlm")
    with_config("does not fit the open_clip model", "vision_cfg", layers=2)
    with_config("open_clip cannot build its model", "vision_cfg", no_such_option=2)
    path.write_text("{}")
    with pytest.raises(InputError, match="has no model_cfg"):
        loaded(tmp_path, class_names=NAMES)


def test_a_lightning_module_with_weights_beside_its_network(tmp_path: Path) -> None:
    network = small(3)
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    state |= {"criterion.weight": torch.ones(3), "accuracy.seen": torch.tensor(7)}
    path = saved(tmp_path / "last.ckpt", {"pytorch-lightning_version": "2.0", "state_dict": state})
    found = loaded(path, **SMALL)
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = network((pixels - found.classifier.mean) / found.classifier.std)
        assert torch.equal(found.classifier(pixels), expected)
    (note,) = [note for note in found.notes if "criterion" in note]
    assert "saved as they are: criterion.weight, accuracy.seen; if" in note
    changed = {name: value + 1 for name, value in network.state_dict().items()}
    load.save(found, changed, tmp_path / "fixed.ckpt")
    written = torch.load(tmp_path / "fixed.ckpt", weights_only=True)["state_dict"]
    assert list(written) == list(state)
    assert torch.equal(written["criterion.weight"], torch.ones(3))
    assert torch.equal(written["model.0.weight"], changed["0.weight"])


def test_names_with_a_prefix_that_are_only_part_of_the_network(tmp_path: Path) -> None:
    """A head outside the prefix that most names have is still the network's."""
    state = {f"model.{name}" if name[0] in "01" else name: v for name, v in small(3).state_dict().items()}
    with pytest.raises(InputError, match=r"missing: 5\.weight"):
        loaded(saved(tmp_path / "m.pt", state), **SMALL)
