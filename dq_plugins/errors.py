"""Every error of this library: one base class, one subclass per kind of trouble.

A message is one paragraph that names the culprit, what was found, what was expected, and what to do. Errors that the
content of a file can cause are a ``ValueError`` too, so that pydantic reports them with their place.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec


class DQError(Exception):
    """Base of every error that dq-plugins raises on purpose."""


class DQWarning(UserWarning):
    """Every warning of this library: it went on, with something that the caller would not expect."""


class RegistryError(DQError):
    """A plugin is unknown, in conflict, denied, incompatible or broken."""


class MissingDependencyError(DQError):
    """An optional package is needed and not installed; the message holds the pip line."""


class TraceError(DQError):
    """A denoiser cannot be traced into a dependency graph."""


class TimestepError(DQError, ValueError):
    """A timestep is missing, malformed, or outside the range that was calibrated."""


class CalibrationError(DQError):
    """A calibration set is empty, incomplete, corrupt, or holds values that are not finite."""


class NeverCalledError(CalibrationError):
    """Sampling ran, and did not call the denoiser that was to be recorded."""


class ArtifactError(DQError):
    """A file of ours is missing, damaged, altered, of other settings, or of another format."""


class PlanError(DQError, ValueError):
    """A plan is malformed, of another model, of a newer format, or names an unknown layer."""


class RecipeError(DQError):
    """A recipe or one of its passes has wrong options, a wrong order, or cannot run."""


class CheckpointError(DQError):
    """A checkpoint is missing, truncated, altered, of another model, or in a format that can run code."""


class BudgetError(DQError):
    """A budget cannot be met; the message names the nearest feasible one."""


def require(package: str, extra: str, purpose: str) -> None:
    """Raise `MissingDependencyError` with the pip line unless ``package`` can be imported.

    Args:
        package: import name, for example ``"torchao"``.
        extra: the extra of dq-plugins that installs it.
        purpose: what it is needed for, as the end of "... is needed to".
    """
    if find_spec(package) is None:
        raise MissingDependencyError(
            f"{package!r} is needed to {purpose}, and it is not installed. "
            f"Install it with: pip install 'dq-plugins[{extra}]'"
        )


def close_matches(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"``, or the empty string if nothing is close; for the end of a message."""
    close = get_close_matches(word, list(known), n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
