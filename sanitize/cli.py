"""The command line: thin commands over the functions of the package, and the one place errors become text."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import sanitize
from sanitize.errors import FindingsError, SanitizeError, UsageError
from sanitize.scores import methods

if TYPE_CHECKING:
    from sanitize.reporting.build import Report

METHODS = ", ".join(methods())
REPAIRS = "pivotal-unlearning, pivotal-tuning, weight-decay, fine-pruning, nad, neural-cleanse"
"""Of sanitize.checkpoints.repair, which loads torch."""
INSPECT_METHODS = "combined, universal-changes, calibrated-trigger-inversion, neural-cleanse or quick"


class _Group(TyperGroup):
    """Turns a SanitizeError into one message and its exit code, whichever command raised it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SanitizeError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            goes_on = ctx.invoked_subcommand in ("scan", "filter", "bench", "repair")
            advice = ": the same command goes on from here" if goes_on else ""
            print(f"interrupted{advice}", file=sys.stderr)
            sys.exit(130)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find poisoned samples in WebDataset image corpora, and backdoors in trained classifiers.",
)

Shards = Annotated[
    str,
    typer.Argument(help="Folder, glob, brace list, ::-joined, @list.txt or URL of .tar[.gz|.zst] shards."),
]
RunFolder = Annotated[Path, typer.Argument(help="Run folder of a scan.")]
Alpha = Annotated[
    float | None,
    typer.Option(
        help="Largest share of clean samples to lose, kept with 90 % confidence. "
        "Default 0.07 unless --reject is given."
    ),
]
Reject = Annotated[
    float | None,
    typer.Option(
        help="Flag this share of the corpus instead; badloss (0.4), abl and others have a published default."
    ),
]
AllowPipe = Annotated[bool, typer.Option("--allow-pipe", help="Run the commands of pipe: shards.")]
NoClassCap = Annotated[bool, typer.Option("--no-class-cap", help="Flag whatever the scores say.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Label = Annotated[str, typer.Option(help="Where labels are: cls, txt or json:path.to.field.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Checkpoint = Annotated[
    Path,
    typer.Argument(help=".safetensors, .pt, .pth, .ckpt or .bin, or a folder of transformers or open_clip."),
]
Arch = Annotated[
    str, typer.Option(help="auto, torchvision:NAME, timm:NAME, hf:FOLDER or package.module:factory.")
]
ClassNames = Annotated[
    str | None, typer.Option(help="Labels in the order of the outputs: a,b,c or a file with one a line.")
]
Prompt = Annotated[
    list[str] | None, typer.Option(help="For a CLIP model, with {} for the label; repeatable.")
]
Mean = Annotated[
    str | None,
    typer.Option(help="Of each channel, of pixels in [0, 1]: 0.5,0.5,0.5. Default: the architecture's."),
]
Std = Annotated[str | None, typer.Option(help="Likewise.")]
ModelSide = Annotated[
    int | None, typer.Option(help="Side in pixels that the model takes. Default: the architecture's.")
]
FailOn = Annotated[
    float | None, typer.Option(help="Exit with 5 if more than this share of the corpus is flagged.")
]


@app.command()
def scan(
    shards: Shards,
    trusted: Annotated[str, typer.Option(help="Small clean subset with the same labels, in the same form.")],
    out: Annotated[Path, typer.Option(help="Run folder; an interrupted run goes on.")] = Path("sanitize-run"),
    label: Label = "cls",
    resolution: Annotated[
        int | None, typer.Option(help="Side of the proxy images in pixels. Default 32 or 64, by image size.")
    ] = None,
    proxy: Annotated[
        str, typer.Option(help="auto, small or a torchvision constructor such as resnet18 or resnet50.")
    ] = "auto",
    epochs: Annotated[int, typer.Option(help="Epochs of proxy training.")] = 20,
    device: Device = "auto",
    trajectory: Annotated[
        str, typer.Option(help="eval: losses after each epoch; online: losses at training time, cheaper.")
    ] = "eval",
    seed: Annotated[int, typer.Option(help="Seed of initialisation, order and scores.")] = 0,
    method: Annotated[str, typer.Option(help=f"Score: {METHODS}.")] = "combined",
    alpha: Alpha = None,
    reject: Reject = None,
    class_cap: Annotated[
        float | None, typer.Option(help="Largest share of one class that may be flagged. Default 0.5.")
    ] = None,
    no_class_cap: NoClassCap = False,
    allow_pipe: AllowPipe = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only count, and estimate disk, memory and time.")
    ] = False,
    fail_on: FailOn = None,
    as_json: Json = False,
) -> None:
    """Find suspicious samples and write kept shards, a quarantine and an audit report."""
    from sanitize.config import CorpusConfig, DecisionConfig, ProxyConfig, ScanConfig
    from sanitize.progress import for_stderr

    config = ScanConfig(
        corpus=CorpusConfig(
            shards=shards, trusted=trusted, label=label, resolution=resolution, allow_pipe=allow_pipe
        ),
        proxy=ProxyConfig(proxy=proxy, epochs=epochs, device=device, trajectory=trajectory, seed=seed),
        decision=DecisionConfig.choose(method, alpha, reject, class_cap, no_class_cap),
    )
    _check_fail_on(fail_on)
    if dry_run:
        from sanitize.estimate import estimate, in_words

        guess = estimate(config, for_stderr())
        print(json.dumps(guess) if as_json else in_words(guess))
        return
    from sanitize.pipeline import run_scan

    _finish(run_scan(config, out, for_stderr()), as_json, fail_on)


@app.command()
def filter(
    run: RunFolder,
    method: Annotated[str | None, typer.Option(help=f"Score: {METHODS}. Default: the scan's.")] = None,
    alpha: Alpha = None,
    reject: Reject = None,
    class_cap: Annotated[
        float | None,
        typer.Option(help="Largest share of one class that may be flagged. Default: the scan's."),
    ] = None,
    no_class_cap: NoClassCap = False,
    allow_pipe: AllowPipe = False,
    fail_on: FailOn = None,
    as_json: Json = False,
) -> None:
    """Make a new decision and new shards from an existing run, without training."""
    from sanitize.progress import for_stderr

    _check_fail_on(fail_on)
    report = sanitize.filter(
        run,
        method=method,
        alpha=alpha,
        reject=reject,
        class_cap=class_cap,
        no_class_cap=no_class_cap,
        allow_pipe=allow_pipe,
        progress=for_stderr(),
    )
    _finish(report, as_json, fail_on)


@app.command()
def report(run: RunFolder, as_json: Json = False) -> None:
    """Build the report of an existing run again."""
    _finish(sanitize.report(run), as_json, None)


@app.command()
def poison(
    shards: Shards,
    out: Annotated[
        Path, typer.Option(help="New folder for the poisoned shards, the truth and the triggers.")
    ],
    attack: Annotated[
        list[str], typer.Option(help="NAME[:ratio], repeatable; with --stamp one NAME. See docs/attacks.md.")
    ],
    target: Annotated[
        str | None, typer.Option(help="Label of the target class. Default: drawn for each attack.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of targets, samples and triggers.")] = 0,
    label: Label = "cls",
    image_format: Annotated[
        str, typer.Option("--format", help="png or jpg; every image of the corpus is written alike.")
    ] = "png",
    quality: Annotated[int, typer.Option(help="Of jpg, 1 to 100.")] = 95,
    stamp: Annotated[
        Path | None, typer.Option(help="Put the trigger of this earlier poison folder on a test set instead.")
    ] = None,
    strength: Annotated[float, typer.Option(help="With --stamp: how strong, 1 as in training.")] = 1.0,
    allow_pipe: AllowPipe = False,
    as_json: Json = False,
) -> None:
    """Poison a copy of a corpus, with ground truth, to test a defence on one's own data."""
    from sanitize.attacks.poison import in_words, poison, stamp_test
    from sanitize.pipeline import cores
    from sanitize.progress import for_stderr

    common: dict[str, Any] = {
        "out": out,
        "label": label,
        "image_format": image_format,
        "quality": quality,
        "workers": cores(),
        "allow_pipe": allow_pipe,
        "progress": for_stderr(),
    }
    if stamp is None:
        made = poison(shards, attacks=attack, target=target, seed=seed, **common)
    elif len(attack) != 1 or target is not None:
        raise UsageError("--stamp takes exactly one --attack NAME and no --target; triggers have theirs")
    else:
        made = stamp_test(shards, triggers=stamp, attack=attack[0], strength=strength, **common)
    print(json.dumps(made) if as_json else in_words(made, out))


@app.command()
def bench(
    config: Annotated[
        Path, typer.Argument(help="TOML file: corpus, attacks, methods, seeds. See docs/bench.md.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for it; an interrupted or extended benchmark goes on.")
    ] = Path("sanitize-bench"),
    as_json: Json = False,
) -> None:
    """Attacks, methods and seeds: poison, scan, retrain, and measure what is left of the attacks."""
    from sanitize.evaluate.bench import bench
    from sanitize.evaluate.tables import markdown
    from sanitize.progress import for_stderr

    result = bench(config, out, for_stderr())
    print(json.dumps(result) if as_json else f"{markdown(result)}\nPage: {out / 'bench.html'}")


@app.command()
def inspect(
    checkpoint: Checkpoint,
    trusted: Annotated[
        str | None,
        typer.Option(help="Shards of a few hundred clean labelled images; only --quick does without."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("sanitize-inspect"),
    method: Annotated[str, typer.Option(help=f"{INSPECT_METHODS}.")] = "combined",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Only what needs no images: less sure, and quick for few classes."),
    ] = False,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Rebuild triggers for these labels (a,b,c) or the most suspicious (top:20). Default: all."
        ),
    ] = None,
    reference: Annotated[
        list[Path] | None,
        typer.Option(
            help="A network known to be clean, of the same classes and architecture, to compare with; three "
            "or more, the option each time."
        ),
    ] = None,
    arch: Arch = "auto",
    class_names: ClassNames = None,
    prompt: Prompt = None,
    mean: Mean = None,
    std: Std = None,
    resolution: ModelSide = None,
    label: Label = "cls",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of split, internal repair and first triggers.")] = 0,
    allow_pipe: AllowPipe = False,
    fail_on: Annotated[
        str | None,
        typer.Option(help="backdoor: exit with 5 if the model looks backdoored, or there is no verdict."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Is this trained classifier backdoored, towards which class, and with what trigger."""
    from sanitize.progress import for_stderr

    if fail_on not in (None, "backdoor"):
        raise UsageError(f"--fail-on {fail_on}: expected backdoor")
    if quick and method not in ("combined", "quick"):
        raise UsageError(f"--quick and --method {method}: give one of them")
    if (quick or method == "quick") and classes:
        raise UsageError("--classes: the quick statistics always look at all of them; leave it out")
    found = sanitize.inspect(
        checkpoint,
        trusted=trusted,
        out=out,
        method="quick" if quick else method,
        classes=classes,
        references=reference or (),
        arch=arch,
        class_names=_class_names(class_names),
        prompts=prompt,
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
        resolution=resolution,
        label=label,
        device=device,
        seed=seed,
        allow_pipe=allow_pipe,
        progress=for_stderr(),
    )
    print(json.dumps(found.to_dict()) if as_json else printable(found.summary()))
    if fail_on and (found.backdoored or not found.compared):
        raise FindingsError(f"{found.verdict}; see {found.path}")


@app.command()
def repair(
    checkpoint: Checkpoint,
    trusted: Annotated[str, typer.Option(help="Shards of a few hundred clean labelled images.")],
    out: Annotated[
        Path, typer.Option(help="New checkpoint, in the input's format; an unfinished run goes on.")
    ],
    method: Annotated[str, typer.Option(help=f"Repair: {REPAIRS}.")] = "pivotal-unlearning",
    max_accuracy_loss: Annotated[
        float,
        typer.Option(
            help="Largest fall of held-out accuracy, as a fraction; the error of measuring it may let up to "
            "twice as much pass."
        ),
    ] = 0.02,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Choose settings on a backdoor planted in a copy; takes longer."),
    ] = False,
    retune_check: Annotated[
        bool,
        typer.Option(
            "--retune-check", help="Plant a backdoor in a copy, repair it, and try to bring it back."
        ),
    ] = False,
    arch: Arch = "auto",
    class_names: ClassNames = None,
    prompt: Prompt = None,
    mean: Mean = None,
    std: Std = None,
    resolution: ModelSide = None,
    label: Label = "cls",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the split, the order and what a method draws.")] = 0,
    allow_pipe: AllowPipe = False,
    as_json: Json = False,
) -> None:
    """Unlearn what may be a backdoor in a copy of a checkpoint, within a stated loss of accuracy."""
    from sanitize.checkpoints.repair_file import in_words
    from sanitize.progress import for_stderr

    done = sanitize.repair(
        checkpoint,
        trusted=trusted,
        out=out,
        method=method,
        max_accuracy_loss=max_accuracy_loss,
        calibrate=calibrate,
        retune_check=retune_check,
        arch=arch,
        class_names=_class_names(class_names),
        prompts=prompt,
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
        resolution=resolution,
        label=label,
        device=device,
        seed=seed,
        allow_pipe=allow_pipe,
        progress=for_stderr(),
    )
    print(json.dumps(done.to_dict()) if as_json else printable(in_words(done)))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the corpus and the run.")] = Path("sanitize-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the corpus, the attacks and the scan.")] = 0,
    as_json: Json = False,
) -> None:
    """Generate a small corpus, plant three attacks in it, scan it and compare with the truth."""
    from sanitize.demo import in_words, run_demo
    from sanitize.progress import for_stderr

    found = run_demo(out, seed, for_stderr())
    print(json.dumps(found) if as_json else in_words(found))


def _class_names(text: str | None) -> Sequence[str] | None:
    if text is None:
        return None
    from sanitize.checkpoints.load import read_class_names

    return read_class_names(text)


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Numbers joined by commas."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: expected numbers, as in 0.5,0.5,0.5") from None


def _check_fail_on(fail_on: float | None) -> None:
    if fail_on is not None and not 0 <= fail_on <= 1:
        raise UsageError(f"--fail-on {fail_on}: expected a share between 0 and 1")


def _finish(report: Report, as_json: bool, fail_on: float | None) -> None:
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        print(summary(report))
    if fail_on is not None and report.flagged > fail_on * report.samples:
        raise FindingsError(
            f"{report.flagged} of {report.samples} samples are flagged, over --fail-on {fail_on}; "
            f"see {report.path}"
        )


def summary(report: Report) -> str:
    """The few lines that `scan`, `filter` and `report` print."""
    folder = report.path.parent
    return "\n".join(
        [
            printable(report.verdict),
            "",
            f"  indexed      {report.samples:>12,}",
            f"  kept         {report.kept:>12,}   {folder / 'kept'}",
            f"  quarantined  {report.quarantined:>12,}   {folder / 'quarantine'}",
            f"    suspicious {report.flagged:>12,}",
            f"    unusable   {report.unusable:>12,}",
            "",
            f"Report: {report.path}",
        ]
    )


def printable(text: str) -> str:
    """Text without control characters: keys and labels are written by strangers."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def main() -> None:
    """Entry point of the `sanitize` command."""
    app()
