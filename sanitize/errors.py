"""Every error that sanitize raises on purpose.

SanitizeError                 exit 1   something that could not be foreseen by the caller
├── UsageError                exit 2   an option or argument that makes no sense
├── InputError                exit 3   shards, labels or a trusted set that cannot be used
├── RunFolderError            exit 4   the run folder belongs to another configuration or another process
├── FindingsError             exit 5   --fail-on: too much was flagged, or a model did not pass
├── TrainingError             exit 1   the proxy model diverged
└── DiskFullError             exit 1   the disk is full; what was there before still stands

The library raises; only ``cli.py`` turns these into a message and an exit code.
"""


class SanitizeError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_code = 1


class UsageError(SanitizeError):
    """An option or argument that makes no sense."""

    exit_code = 2


class InputError(SanitizeError):
    """Input that cannot be read or used."""

    exit_code = 3


class RunFolderError(SanitizeError):
    """The run folder belongs to another configuration, or another process works in it."""

    exit_code = 4


class FindingsError(SanitizeError):
    """More was flagged than the caller allowed, or a model did not pass."""

    exit_code = 5


class TrainingError(SanitizeError):
    """Proxy training did not produce usable losses."""


class DiskFullError(SanitizeError):
    """No space left; finished files are untouched."""
