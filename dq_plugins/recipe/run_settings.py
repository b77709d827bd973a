"""What a folder of intermediate results belongs to: one run of a recipe, with these settings, by this code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from dq_plugins.artifact import STRICT, Format
from dq_plugins.plan import Targets

LONGEST = 60
"""Characters of a value that a difference shows."""


@dataclass(frozen=True)
class RunSettings:
    """Everything that determines the plan of a run.

    Attributes:
        weights: hash of the denoiser's weights.
        calibration: hash of the calibration set.
        targets: of the run.
        seed: of every random choice.
        passes: names, in order.
        options: of the passes, all of them, in the same order.
        code: what computes, by name: release and hash of the source, see `dq_plugins.provenance`.
    """

    __pydantic_config__ = STRICT

    weights: str
    calibration: str
    targets: Targets
    seed: int
    passes: list[str]
    options: list[dict[str, Any]]
    code: dict[str, str]

    def differences(self, found: RunSettings) -> list[str]:
        """In words, what another run was given that this one is not; the code is left out."""
        return [f"{name} is {_text(here)} here and {_text(there)} there" for name, here, there in self._compared(found)]

    def _compared(self, found: RunSettings) -> Iterator[tuple[str, Any, Any]]:
        pairs: list[tuple[str, Any, Any]] = [
            ("the hash of the denoiser's weights", self.weights, found.weights),
            ("the hash of the calibration set", self.calibration, found.calibration),
            *((f.name, getattr(self.targets, f.name), getattr(found.targets, f.name)) for f in fields(Targets)),
            ("seed", self.seed, found.seed),
            ("the list of passes", ", ".join(self.passes), ", ".join(found.passes)),
        ]
        if self.passes == found.passes:
            for name, here, there in zip(self.passes, self.options, found.options, strict=True):
                keys = sorted(here.keys() | there.keys())
                pairs += [
                    (f"option {key} of {name}", here.get(key, "absent"), there.get(key, "absent")) for key in keys
                ]
        yield from (pair for pair in pairs if pair[1] != pair[2])

    def other_code(self, found: RunSettings) -> list[str]:
        """In words, the code that is not the same."""
        names = sorted(self.code.keys() | found.code.keys())
        pairs = [(name, self.code.get(name, "absent"), found.code.get(name, "absent")) for name in names]
        return [f"{name} is {here} here and {there} there" for name, here, there in pairs if here != there]


RUN: Format[RunSettings] = Format("recipe-run", 1, RunSettings, what="the settings of a recipe's run")
RUN_NAME = "run.json"


def per_step(settings: RunSettings) -> list[dict[str, Any]]:
    """What the plan after each step depends on."""
    given = {
        "weights": settings.weights,
        "calibration": settings.calibration,
        "targets": settings.targets,
        "seed": settings.seed,
        "code": settings.code,
    }
    steps = [{"pass": n, "options": o} for n, o in zip(settings.passes, settings.options, strict=True)]
    return [{**given, "steps": steps[: i + 1]} for i in range(len(steps))]


def of_last_step(found: dict[str, Any]) -> RunSettings | None:
    """The run that the settings of its last step belong to, see `per_step`; None where they are no such settings."""
    try:
        steps = found["steps"]
        given = {name: found[name] for name in ("weights", "calibration", "seed", "code")}
        passes, options = [step["pass"] for step in steps], [step["options"] for step in steps]
        return RunSettings(targets=Targets(**found["targets"]), passes=passes, options=options, **given)
    except (KeyError, TypeError):
        return None


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
