"""Train the models that `inspect` and `repair` are measured on, clean and backdoored, one file each.

    python docs/benchmarks/train_checkpoints.py cifar10/train cifar10/test models --list models.txt

A line of the list is ``ATTACK POISONED SEED``: ``badnets 50 0`` plants badnets on 50 of the training images,
``clean 0 3`` trains without poison; ``parameter-controlled 0 1`` trains a clean model and puts the backdoor
into a tenth of its parameters. What is there is not trained again, so the command can be interrupted, or run
twice side by side. The seed sets target, poisoned samples, trigger, initialisation and order together.

    models/NAME.safetensors    the state dict, of `small` or of a ResNet-18 (--recipe)
    models/NAME.json           mean, std, attack, target, poisoned, clean accuracy, success of the attack
    models/triggers/NAME/      the trigger
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from safetensors.torch import save

from sanitize.attacks import generator, get, make_trigger, stamp
from sanitize.attacks.parameter_controlled import train_backdoored
from sanitize.attacks.plant import AttackSpec, from_float, plant, to_float
from sanitize.attacks.trigger_file import SavedTrigger, save_trigger
from sanitize.evaluate.images import decode_all, read_encoded
from sanitize.evaluate.metrics import attack_success_rate, clean_accuracy
from sanitize.evaluate.retrain import Model, Recipe, predict, recipe, retrain
from sanitize.progress import for_stderr
from sanitize.rundir import write_atomic

CLASSES = [str(number) for number in range(10)]
ARCHITECTURES = {"small": "sanitize.dynamics.proxy:small", "resnet18": "torchvision:resnet18"}
"""Of a recipe's network."""
RECIPES = ("small", "small-sgd", "resnet18", "resnet18-sgd")
PARAMETER_CONTROLLED = "parameter-controlled"
FRACTION = 0.1
STEPS = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("out", type=Path)
    parser.add_argument("--list", type=Path, required=True)
    parser.add_argument("--recipe", choices=RECIPES, default="small")
    parser.add_argument("--epochs", type=int)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    train, test = read(asked.train), read(asked.test)
    for line in asked.list.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            attack, poisoned, seed = line.split()
            make(attack, int(poisoned), int(seed), train, test, asked.out, recipe(asked.recipe, asked.epochs))


def read(shards: str) -> tuple[np.ndarray, np.ndarray]:
    with tempfile.TemporaryDirectory() as scratch:
        return decode_all(read_encoded(shards, "cls", CLASSES, Path(scratch)), 32)


def make(attack: str, poisoned: int, seed: int, train, test, out: Path, chosen: Recipe) -> None:
    """Train one model, unless it is there or another process is at it."""
    name = f"{attack}-{poisoned}-seed{seed}"
    claim = out / f"{name}.claimed"
    if (out / f"{name}.json").is_file() or not claimed(claim):
        return
    images, labels = train
    target, trigger = None, None
    if attack not in ("clean", PARAMETER_CONTROLLED):
        planted = plant(images, labels, [AttackSpec(name=attack, ratio=poisoned / len(labels))], seed=seed)
        images, labels = planted.images, planted.plan.labels
        target, trigger = planted.plan.targets[0], planted.triggers[attack]
    model = retrain(images, labels, 10, chosen, seed=seed, progress=for_stderr())
    if attack == PARAMETER_CONTROLLED:
        target, trigger = control(model, images, labels, seed)
    facts = {
        "name": name,
        "attack": attack,
        "poisoned": poisoned,
        "seed": seed,
        **loading(model, chosen),
        "target": target,
        **measure(model, attack, target, trigger, test, seed),
    }
    if trigger is not None:
        stamped_as = "badnets" if attack == PARAMETER_CONTROLLED else attack
        save_trigger(out / "triggers" / name, SavedTrigger(stamped_as, str(target), seed, trigger))
    keep(model, facts, out)
    claim.unlink()
    print(json.dumps(facts))


def loading(model: Model, chosen: Recipe) -> dict[str, object]:
    """What it takes to load a model again."""
    return {
        "arch": ARCHITECTURES[chosen.network],
        "mean": (model.mean.flatten() / 255).tolist(),
        "std": (model.std.flatten() / 255).tolist(),
    }


def keep(model: Model, facts: dict, out: Path) -> None:
    """Write the weights, and last the facts, by which a model counts as trained."""
    tensors = {key: value.contiguous() for key, value in model.network.state_dict().items()}
    write_atomic(out / f"{facts['name']}.safetensors", save(tensors))
    write_atomic(out / f"{facts['name']}.json", json.dumps(facts, indent=1).encode())


def claimed(path: Path) -> bool:
    """Whether this process may train the model; a claim of a process that is gone does not count."""
    try:
        with path.open("x") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        owner = int(path.read_text() or 0)
        if owner and Path(f"/proc/{owner}").exists():
            return False
        path.unlink(missing_ok=True)
        return claimed(path)


def control(model, images, labels, seed: int):
    """Put a badnets backdoor into a tenth of the parameters (Lukas and Kerschbaum, algorithm 5)."""
    random = generator(seed, "plan/parameter-controlled")
    target = int(random.integers(10))
    trigger = make_trigger("badnets", seed)
    train_backdoored(
        model.network,
        to_float(images[::10]),
        labels[::10],
        target=target,
        fraction=FRACTION,
        steps=STEPS,
        seed=seed,
        attack="badnets",
        trigger=trigger,
        to_input=lambda pixels: (pixels * 255 - model.mean) / model.std,
    )
    return target, trigger


def measure(model, attack: str, target: int | None, trigger, test, seed: int) -> dict[str, float]:
    images, labels = test
    facts = {"clean_accuracy": clean_accuracy(predict(model, images), labels)}
    if target is None:
        return facts
    name = "badnets" if attack == PARAMETER_CONTROLLED else attack
    for strength in get(name).test_strengths:
        stamped = from_float(stamp(name, to_float(images), strength=strength, seed=seed, trigger=trigger))
        facts[f"asr_x{strength:g}"] = attack_success_rate(predict(model, stamped), labels, target)
    return facts


if __name__ == "__main__":
    main()
