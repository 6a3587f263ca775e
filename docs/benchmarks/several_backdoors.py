"""Several backdoors in one model: train such models, inspect and repair each, and measure every trigger.

    python docs/benchmarks/several_backdoors.py cifar10/train cifar10/train-trusted cifar10/test models out \
        badnets:300+sinusoid:400@300 patch:400+adaptive-blend:200@301

A model is written ATTACK:POISONED+ATTACK:POISONED@SEED. What is there is neither trained nor measured again.
One JSON file a model in out/: class scores of `inspect`, facts of `repair`, and clean accuracy and success of
every trigger on the test images before and after. At the end a table over all files in out/.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from checkpoint_defences import best, first_of_each, judged, load, markdown, read
from train_checkpoints import keep, loading

from sanitize.attacks.plant import AttackSpec, plant
from sanitize.attacks.trigger_file import SavedTrigger, save_trigger
from sanitize.checkpoints.inspect import InspectConfig, inspect_classifier
from sanitize.checkpoints.repair import RepairConfig, repair_classifier
from sanitize.evaluate.retrain import recipe, retrain
from sanitize.progress import for_stderr
from sanitize.rundir import write_atomic

TRUSTED = 500


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("trusted")
    parser.add_argument("test")
    parser.add_argument("models", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("model", nargs="+")
    parser.add_argument("--recipe", default="small")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    trusted, test = first_of_each(read(asked.trusted), TRUSTED), read(asked.test)
    for line in asked.model:
        path = asked.out / f"{line.replace(':', '-')}.json"
        if path.is_file():
            continue
        model = trained(line, asked.train, asked.models, recipe(asked.recipe))
        cell = measured(load(model, asked.models, trusted), model, trusted, test, asked.models)
        write_atomic(path, json.dumps(cell, indent=1).encode())
    print(table([json.loads(path.read_text()) for path in sorted(asked.out.glob("*.json"))]))


def trained(line, shards, folder, chosen):
    """Facts of the model, trained unless it is there."""
    name, seed = line.replace(":", "-"), int(line.partition("@")[2])
    path = folder / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    train = read(shards)
    images, labels = train.pixels, train.class_id
    counts = dict(part.split(":") for part in line.partition("@")[0].split("+"))
    specs = [AttackSpec(name=attack, ratio=int(count) / len(labels)) for attack, count in counts.items()]
    planted = plant(images, labels, specs, seed=seed)
    model = retrain(planted.images, planted.plan.labels, 10, chosen, seed=seed, progress=for_stderr())
    backdoors = []
    for attack, target in zip(planted.plan.names, planted.plan.targets, strict=True):
        one = {"name": f"{name}--{attack}", "attack": attack, "target": target, "seed": seed}
        trigger = SavedTrigger(attack, str(target), seed, planted.triggers[attack])
        save_trigger(folder / "triggers" / one["name"], trigger)
        backdoors.append(one)
    facts = {"name": name, "seed": seed, **loading(model, chosen), "backdoors": backdoors}
    keep(model, facts, folder)
    return facts


def measured(classifier, model, trusted, test, folder):
    """Class scores of `inspect`, facts of `repair`, every trigger before and after."""
    looked = inspect_classifier(classifier, trusted, InspectConfig(), for_stderr())
    found = repair_classifier(classifier, trusted, RepairConfig(seed=model["seed"]), for_stderr())
    before, after = (
        [judged(one, backdoor, test, folder) for backdoor in model["backdoors"]]
        for one in (classifier, found.classifier)
    )
    rates = [
        backdoor | {"at": best(old), "before": old[best(old)], "after": new[best(old)]}
        for backdoor, old, new in zip(model["backdoors"], before, after, strict=True)
    ]
    scores = looked.class_scores["combined"]
    return {
        "model": model["name"],
        "clean_accuracy": [before[0]["clean_accuracy"], after[0]["clean_accuracy"]],
        "backdoors": rates,
        "class_scores": np.asarray(scores).tolist(),
        "facts": found.facts,
        "history": found.history,
    }


def table(cells):
    rows = []
    for cell in cells:
        triggers = ", ".join(
            f"{one['attack']} ({one['target']}) {100 * one['before']:.1f} -> {100 * one['after']:.1f}"
            for one in cell["backdoors"]
        )
        order = np.argsort(cell["class_scores"])[::-1]
        highest = ", ".join(f"{name} {cell['class_scores'][name]:.2f}" for name in order[:3])
        suspects = ", ".join(
            f"{one['kind']} {one['class']}" for one in cell["facts"]["suspected_triggers"] or []
        )
        lost = 100 * (cell["clean_accuracy"][0] - cell["clean_accuracy"][1])
        kept = "" if cell["facts"]["repaired"] else "none kept"
        rows.append([cell["model"], triggers, f"{lost:.1f}", kept, highest, suspects])
    return markdown(
        ["model", "triggers (target), %", "points lost", "", "highest classes", "suspected"], rows
    )


if __name__ == "__main__":
    main()
