"""Triggers on disk: one .npz an attack, without pickle."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sanitize.attacks import Trigger, get
from sanitize.errors import InputError
from sanitize.rundir import write_atomic

_FACTS = ("attack", "target_label", "seed")


class SavedTrigger(NamedTuple):
    attack: str
    target_label: str
    seed: int
    trigger: Trigger


def save_trigger(folder: Path, saved: SavedTrigger) -> Path:
    """Write ``folder/ATTACK.npz``; the same trigger gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {name: np.array(value) for name, value in zip(_FACTS, saved[:3], strict=True)}
    buffer = io.BytesIO()
    arrays = facts | {f"trigger/{name}": array for name, array in saved.trigger.items()}
    np.savez(buffer, allow_pickle=False, **arrays)
    path = folder / f"{saved.attack}.npz"
    write_atomic(path, buffer.getvalue())
    return path


def load_trigger(path: Path, attack: str) -> SavedTrigger:
    """Read a trigger.

    Args:
        path: an .npz file, the folder that holds it, or the --out of `sanitize poison`.
        attack: its name.

    Raises:
        InputError: not there, not a trigger file, or of another attack.
        UsageError: no such attack.
    """
    get(attack)
    tried = [path, path / f"{attack}.npz", path / "triggers" / f"{attack}.npz"]
    file = next((candidate for candidate in tried if candidate.is_file()), None)
    if file is None:
        raise InputError(f"{path} holds no trigger of {attack}; give the --out of: sanitize poison")
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        facts = [arrays.pop(name).item() for name in _FACTS]
    except (ValueError, KeyError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} is no trigger file of sanitize poison ({error})") from None
    if facts[0] != attack:
        raise InputError(f"{file} is the trigger of {facts[0]}, not of {attack}")
    trigger = {name.removeprefix("trigger/"): array for name, array in arrays.items()}
    return SavedTrigger(facts[0], facts[1], facts[2], trigger)
