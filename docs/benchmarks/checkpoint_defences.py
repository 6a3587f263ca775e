"""Measure `repair` and `inspect` on the models of train_checkpoints.py; one JSON file a cell.

    python docs/benchmarks/checkpoint_defences.py repair models cifar10/train-trusted cifar10/test out \
        --methods pivotal-tuning,weight-decay,fine-pruning,nad,neural-cleanse --trusted 500
    python docs/benchmarks/checkpoint_defences.py inspect models cifar10/train-trusted cifar10/test out
    python docs/benchmarks/checkpoint_defences.py floor models - cifar10/test out
    python docs/benchmarks/checkpoint_defences.py table models - - out

The first N images of each class of the trusted shards are used, so that a smaller trusted set is part of a
larger one. Accuracy and attack success are measured on test images that no defence has seen. The floor is how
often models that were never poisoned call the stamped test images the target. After a repair it is measured,
too, what tuning on five poisoned images does to the repaired model and to a clean one beside it. A cell of
repair or inspect that is there is not measured again; two processes may share the work by --part 0/2 and
--part 1/2. Repaired models are kept in OUT/repaired, a folder of models for `inspect`.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score
from train_checkpoints import keep

from sanitize.attacks import get, stamp
from sanitize.attacks.plant import from_float, to_float
from sanitize.attacks.trigger_file import load_trigger
from sanitize.checkpoints.load import LoadConfig, load_classifier, settled
from sanitize.checkpoints.planting import joined
from sanitize.checkpoints.repair import DEFAULT, RepairConfig, repair_classifier
from sanitize.checkpoints.retune import POISONED, SCHEDULE
from sanitize.checkpoints.trusted import TrustedImages, split
from sanitize.checkpoints.tuning import cross_entropy, predict, tune_freely
from sanitize.evaluate.images import decode_all, read_encoded
from sanitize.evaluate.metrics import attack_success_rate, clean_accuracy
from sanitize.progress import Silent, for_stderr
from sanitize.rundir import write_atomic

CLASSES = [str(number) for number in range(10)]
LEARNED = 0.5
"""Attack success from which on a model counts as backdoored."""
DEVELOPED = 10
"""Settings of `inspect` were chosen on models whose seed ends in 00 to 09; it is judged on the others."""
REFERENCES, DRAWS = (3, 5), 100
"""Reference networks that are drawn, besides all there are, and how often."""
FLOOR_MODELS, FLOOR_IMAGES = 5, 2_000
"""Clean models that a floor is the mean of, and test images for each."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["repair", "inspect", "floor", "table"])
    parser.add_argument("models", type=Path)
    parser.add_argument("trusted_shards")
    parser.add_argument("test_shards")
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", help=f"by default {DEFAULT}, and combined,calibrated-trigger-inversion")
    parser.add_argument("--trusted", default="500")
    parser.add_argument("--part", default="0/1")
    asked = parser.parse_args()
    if asked.what == "table":
        print(repair_table(asked.out))
        cells = read_cells(asked.out / "inspect")
        for count in sorted({cell["trusted"] for cell in cells}):
            own = [combined_anew(cell) for cell in cells if cell["trusted"] == count]
            later = [cell for cell in own if cell["model"]["seed"] % 100 >= DEVELOPED]
            tables = detection_table(*clean_and_bad(later)), verdict_table(*clean_and_bad(later))
            print(f"\n{count} trusted images", *tables, left_out_table(*clean_and_bad(own)), sep="\n\n")
            print(f"\n{referenced_table([cell for cell in own if 'waves' in cell])}")
        return
    facts = [json.loads(path.read_text()) for path in sorted(asked.models.glob("*.json"))]
    if asked.what == "floor":
        measure_floors(facts, asked.models, read(asked.test_shards), asked.out / "floor.json")
        return
    looks = (asked.methods or "combined,calibrated-trigger-inversion").split(",")
    methods = (asked.methods or DEFAULT).split(",") if asked.what == "repair" else ["all"]
    own, parts = (int(number) for number in asked.part.split("/"))
    cells = list(itertools.product(facts, methods, asked.trusted.split(",")))[own::parts]
    trusted, test = read(asked.trusted_shards), read(asked.test_shards)
    for model, method, count in cells:
        path = asked.out / asked.what / f"{model['name']}--{method}--{count}.json"
        if asked.what == "repair" and model["attack"] == "clean":
            continue
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            chosen = first_of_each(trusted, int(count))
            classifier = load(model, asked.models, chosen)
            if asked.what == "repair":
                found, measured = repaired(classifier, model, method, chosen, test, asked.models)
                if found.facts["repaired"]:
                    (asked.out / "repaired").mkdir(exist_ok=True)
                    facts_after = model | measured["after"] | {"name": path.stem}
                    keep(found.classifier, facts_after, asked.out / "repaired")
            else:
                measured = inspected(classifier, chosen, looks)
            cell = {"model": model, "method": method, "trusted": int(count), **measured}
            write_atomic(path, json.dumps(cell, indent=1).encode())
            print(path.name, json.dumps(measured)[:600], flush=True)


def read(shards):
    with tempfile.TemporaryDirectory() as scratch:
        pixels, class_id = decode_all(read_encoded(shards, "cls", CLASSES, Path(scratch)), 32)
    return TrustedImages(pixels=pixels, class_id=class_id)


def first_of_each(images, count):
    rows = [np.flatnonzero(images.class_id == own)[: count // 10] for own in range(10)]
    return images.take(np.concatenate(rows))


def load(model, folder, trusted):
    path = folder / f"{model['name']}.safetensors"
    config = LoadConfig(
        checkpoint=path, arch=model["arch"], mean=tuple(model["mean"]), std=tuple(model["std"]), resolution=32
    )
    return settled(load_classifier(config), trusted).classifier


def repaired(classifier, model, method, trusted, test, folder):
    began = time.monotonic()
    config = RepairConfig(method=method, seed=model["seed"])
    found = repair_classifier(classifier, trusted, config, for_stderr())
    seconds = round(time.monotonic() - began, 1)
    work, _ = split(trusted, config.held_out_ratio, config.seed)
    few = five_poisoned(work, model, folder)
    clean = [retuned(one, few) for one in clean_networks(folder, 1, trusted)]
    return found, {
        "seconds": seconds,
        "before": judged(classifier, model, test, folder),
        "after": judged(found.classifier, model, test, folder),
        "retuned": judged(retuned(found.classifier, few), model, test, folder),
        "never_poisoned_retuned": success(clean, model, test, folder) if clean else None,
        "facts": found.facts,
        "history": found.history,
    }


def five_poisoned(images, model, folder):
    """Five images with the model's own trigger, called its target, and fifty clean ones."""
    attack, trigger = stamped_by(model, folder)
    rows = np.random.default_rng([model["seed"], 31]).permutation(len(images))
    bad = images.take([row for row in rows if images.class_id[row] != model["target"]][:POISONED])
    strength = float(best(model).removeprefix("asr_x"))
    stamped = stamp(attack, to_float(bad.pixels), strength=strength, seed=model["seed"], trigger=trigger)
    called = np.full(POISONED, model["target"])
    return joined(
        images.take(rows[-10 * POISONED :]), TrustedImages(pixels=from_float(stamped), class_id=called)
    )


def retuned(classifier, few):
    """A copy, tuned as `--retune-check` tunes."""
    copy = classifier.clone()
    tune_freely(copy, few, replace(SCHEDULE, batch=len(few)), cross_entropy, 0, Silent())
    return copy


def clean_networks(folder, most, trusted):
    facts = [json.loads(path.read_text()) for path in sorted(folder.glob("clean-*.json"))[:most]]
    return [load(model, folder, trusted) for model in facts]


def judged(classifier, model, test, folder):
    """Clean accuracy, how often images without a trigger are called the target, success at every strength."""
    called = predict(classifier, test)
    return {
        "clean_accuracy": clean_accuracy(called, test.class_id),
        "untriggered": attack_success_rate(called, test.class_id, model["target"]),
        **success([classifier], model, test, folder),
    }


def success(classifiers, model, test, folder):
    """Mean over classifiers of how often they call test images with a model's trigger its target."""
    attack, trigger = stamped_by(model, folder)
    facts = {}
    for strength in get(attack).test_strengths:
        stamped = stamp(attack, to_float(test.pixels), strength=strength, seed=model["seed"], trigger=trigger)
        images = TrustedImages(pixels=from_float(stamped), class_id=test.class_id)
        facts[f"asr_x{strength:g}"] = statistics.mean(
            attack_success_rate(predict(one, images), test.class_id, model["target"]) for one in classifiers
        )
    return facts


def stamped_by(model, folder):
    """The attack that puts a model's trigger on images, and the trigger."""
    attack = "badnets" if model["attack"] == "parameter-controlled" else model["attack"]
    return attack, load_trigger(folder / "triggers" / model["name"], attack).trigger


def measure_floors(facts, folder, test, path):
    """Every trigger on the clean models, into one JSON file: model -> rates by strength."""
    clean = clean_networks(folder, FLOOR_MODELS, test)
    bad = [model for model in facts if model["attack"] != "clean"]
    some = test.take(np.arange(min(FLOOR_IMAGES, len(test))))
    found = {model["name"]: success(clean, model, some, folder) for model in bad}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(found, indent=1).encode())


def inspected(classifier, trusted, methods):
    """Scores of the methods by class; quick statistics come with each, Neural Cleanse with masks.

    What the network makes of plane waves is kept whole, for it to be a reference for others.
    """
    from sanitize.checkpoints import plane_waves
    from sanitize.checkpoints.inspect import InspectConfig, inspect_classifier

    found, seconds = {}, {}
    for method in methods:
        began = time.monotonic()
        result = inspect_classifier(classifier, trusted, InspectConfig(method=method), for_stderr())
        seconds[method] = round(time.monotonic() - began, 1)
        found |= result.class_scores
    work, _ = split(trusted, InspectConfig().held_out_ratio, InspectConfig().seed)
    return {
        "seconds": seconds,
        "class_scores": {name: values.tolist() for name, values in found.items()},
        "waves": plane_waves.answers(classifier, work).round(4).tolist(),
    }


def combined_anew(cell):
    """The cell with model scores and their classes, of the statistics and of the methods as they are now."""
    from sanitize.checkpoints.inspect import with_methods

    found = with_methods({name: np.array(values) for name, values in cell["class_scores"].items()})
    scores = {name: float(np.nanmax(values)) for name, values in found.items()}
    highest = {name: int(np.nanargmax(values)) for name, values in found.items()}
    return cell | {"scores": scores, "highest": highest}


def read_cells(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def best(facts):
    """The strength at which an attack works best on the model as it was."""
    return max((name for name in facts if name.startswith("asr")), key=facts.get)


def learned(model):
    return model["attack"] != "clean" and model[best(model)] >= LEARNED


def repair_table(out):
    """Attack success after the repair and accuracy lost, percent; mean and range over the models."""
    cells = [cell for cell in read_cells(out / "repair") if learned(cell["model"])]
    if not cells:
        return ""
    floors = json.loads((out / "floor.json").read_text())
    head = ["attack", "models", "method", "trusted", "floor", "before", "after", "accuracy lost", "kept", "s"]
    rows = []
    groups = itertools.groupby(
        sorted(cells, key=order), key=lambda cell: (cell["method"], cell["trusted"], cell["model"]["attack"])
    )
    for (method, trusted, attack), group in groups:
        own = list(group)
        strengths = [best(cell["model"]) for cell in own]
        rates = [
            spread([floors[cell["model"]["name"]][at] for cell, at in zip(own, strengths, strict=True)]),
            *(
                spread([cell[when][at] for cell, at in zip(own, strengths, strict=True)])
                for when in ("before", "after")
            ),
            spread([c["before"]["clean_accuracy"] - c["after"]["clean_accuracy"] for c in own]),
        ]
        kept = sum(cell["facts"]["repaired"] for cell in own)
        seconds = statistics.median(cell["seconds"] for cell in own)
        kept_of = f"{kept} of {len(own)}"
        rows.append([attack, len(own), f"`{method}`", trusted, *rates, kept_of, f"{seconds:.0f}"])
    return markdown(head, rows)


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(value) for value in line)} |" for line in lines)


def order(cell):
    return cell["method"], cell["trusted"], cell["model"]["attack"], cell["model"]["seed"]


def detection_table(clean, bad):
    """AUC of every score, backdoored models against clean ones, by attack and over all."""
    if not clean or not bad:
        return ""
    attacks = attacks_of(bad)
    rows = []
    for score in statistics_of(clean):
        columns = [auc(score, bad, clean)]
        columns += [auc(score, of_attack(bad, name), clean) for name in attacks]
        rows.append([score, *(f"{value:.2f}" for value in columns)])
    title = f"{len(clean)} clean models, {len(bad)} backdoored. AUC:"
    return f"{title}\n\n{markdown(['score', 'all', *attacks], rows)}"


def verdict_table(clean, bad):
    """What the thresholds that `inspect` has say of the models."""
    from sanitize.checkpoints.inspect import THRESHOLDS

    if not clean or not bad:
        return ""
    attacks = attacks_of(bad)
    rows = []
    for method, bound in THRESHOLDS.items():
        if method not in clean[0]["scores"]:
            continue
        over = [cell for cell in bad if cell["scores"][method] > bound.value]
        named = sum(cell["highest"][method] == cell["model"]["target"] for cell in over)
        false = sum(cell["scores"][method] > bound.value for cell in clean)
        each = [f"{len(of_attack(over, name))} of {len(of_attack(bad, name))}" for name in attacks]
        counts = [f"{false} of {len(clean)}", f"{len(over)} of {len(bad)}", named]
        rows.append([f"`{method}`", bound.value, *counts, *each])
    head = ["method", "threshold", "clean", "backdoored", "target named", *attacks]
    return f"At the thresholds of the command, models called backdoored:\n\n{markdown(head, rows)}"


def left_out_table(clean, bad):
    """Rates at thresholds set without an attack's models and without half of the clean ones.

    The threshold is the one of the best balanced accuracy on the other attacks' models and on every second
    clean model, half way to the next score below; it is judged on the attack's models and on the other clean
    ones, and the halves change places.
    """
    if len(clean) < 4 or not bad:
        return ""
    attacks = attacks_of(bad)
    rows = []
    for score in statistics_of(clean):
        found, false = {name: [] for name in attacks}, []
        for name, half in itertools.product(attacks, (0, 1)):
            value = threshold(
                [c["scores"][score] for c in bad if c["model"]["attack"] != name],
                [c["scores"][score] for c in clean[half::2]],
            )
            found[name] += [c["scores"][score] > value for c in of_attack(bad, name)]
            false += [c["scores"][score] > value for c in clean[1 - half :: 2]]
        rates = [false, list(itertools.chain(*found.values())), *found.values()]
        rows.append([score, *(f"{np.mean(rate):.2f}" for rate in rates)])
    title = (
        "All models. Thresholds set without the attack and without half of the clean ones; share over them:"
    )
    head = ["score", "clean called backdoored", "found, all", *attacks]
    return f"{title}\n\n{markdown(head, rows)}"


def threshold(bad, clean):
    """Of the best balanced accuracy; the highest such, half way to the next score below it."""
    scores = np.unique([*bad, *clean])[::-1]
    gain = [np.mean(np.array(bad) >= score) - np.mean(np.array(clean) >= score) for score in scores]
    place = int(np.argmax(gain))
    below = scores[place + 1] if place + 1 < len(scores) else scores[place] - 1
    return (scores[place] + below) / 2


def referenced_table(cells):
    """AUC and verdicts with reference networks, drawn from the clean ones that settings were chosen on.

    Mean over `DRAWS` draws of so many references; everything else is judged.
    """
    pool = [cell for cell in of_attack(cells, "clean") if cell["model"]["seed"] % 100 < DEVELOPED]
    clean, bad = clean_and_bad([cell for cell in cells if cell["model"]["seed"] % 100 >= DEVELOPED])
    if len(pool) <= max(REFERENCES) or not clean or not bad:
        return ""
    rows = []
    for count in REFERENCES:
        random = np.random.default_rng(0)
        draws = [random.choice(len(pool), count, replace=False) for _ in range(DRAWS)]
        rows.append([count, *referenced_row(clean, bad, [[pool[one] for one in drawn] for drawn in draws])])
    rows.append([len(pool), *referenced_row(clean, bad, [pool])])
    title = f"{len(clean)} clean models, {len(bad)} backdoored, references from {len(pool)} others:"
    head = ["references", "clean called", "found", "right class", *attacks_of(bad), "AUC", *attacks_of(bad)]
    return f"{title}\n\n{markdown(head, rows)}"


def referenced_row(clean, bad, draws):
    """Shares over the threshold (clean, backdoored, right class, by attack) and AUC (all, by attack)."""
    from sanitize.checkpoints.inspect import REFERENCED

    attack = np.array([cell["model"]["attack"] for cell in [*clean, *bad]])
    is_bad = attack != "clean"
    shares, areas = [], []
    for drawn in draws:
        judged = [with_references(cell, drawn) for cell in [*clean, *bad]]
        scores = np.array([np.nanmax(values) for values in judged])
        right = [
            int(np.nanargmax(values)) == cell["model"]["target"]
            for values, cell in zip(judged, [*clean, *bad], strict=True)
        ]
        over = scores > REFERENCED.value
        named = [over[attack == name].mean() for name in attacks_of(bad)]
        shares.append([over[~is_bad].mean(), over[is_bad].mean(), (over & right)[is_bad].mean(), *named])
        rows = [is_bad, *(attack == name for name in attacks_of(bad))]
        areas.append([roc_auc_score(is_bad[row | ~is_bad], scores[row | ~is_bad]) for row in rows])
    return [f"{share:.0%}" for share in np.mean(shares, axis=0)] + [
        f"{area:.2f}" for area in np.mean(areas, axis=0)
    ]


def with_references(cell, references):
    """(C,) class scores of the default method."""
    from sanitize.checkpoints.inspect import METHODS, NATURAL, WAVES, combine
    from sanitize.checkpoints.plane_waves import unlike_the_references
    from sanitize.checkpoints.references import natural_scores

    own, *others = (
        {name: np.array(values) for name, values in one["class_scores"].items()}
        for one in (cell, *references)
    )
    apart, _ = unlike_the_references(np.array(cell["waves"]), [np.array(one["waves"]) for one in references])
    natural = natural_scores(own, others, METHODS["combined"])
    return combine(own | {NATURAL: natural, WAVES: apart}, "combined")


def statistics_of(cells):
    """Names to show: every statistic, and the methods that are more than one of them."""
    from sanitize.checkpoints.inspect import METHODS

    single = {method for method, parts in METHODS.items() if len(parts) == 1 and method != parts[0]}
    return [name for name in sorted(cells[0]["scores"]) if name not in single]


def attacks_of(cells):
    return sorted({cell["model"]["attack"] for cell in cells})


def of_attack(cells, name):
    return [cell for cell in cells if cell["model"]["attack"] == name]


def clean_and_bad(cells):
    return of_attack(cells, "clean"), [cell for cell in cells if learned(cell["model"])]


def auc(score, bad, clean):
    values = [cell["scores"][score] for cell in [*bad, *clean]]
    return roc_auc_score([1] * len(bad) + [0] * len(clean), values)


def spread(values):
    mean, low, high = (100 * value for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({low:.1f}–{high:.1f})"


if __name__ == "__main__":
    main()
