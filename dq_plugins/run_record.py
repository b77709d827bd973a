"""What ``dq-plugins quantize`` leaves in its folder about itself, for commands that look at the run later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dq_plugins.artifact import STRICT, Format

RUN_NAME = "run.json"


@dataclass(frozen=True)
class RunRecord:
    """A run.

    Attributes:
        model: folder of the full-precision pipeline.
        components: attribute names of its denoisers.
        backend: adapter that executes the plans.
        sampling: arguments that ``dq_plugins.commands.record.add_sampling_arguments`` declares.
    """

    __pydantic_config__ = STRICT

    model: str
    components: tuple[str, ...]
    backend: str
    sampling: dict[str, Any]


RUN: Format[RunRecord] = Format("run", 1, RunRecord, what="the record that dq-plugins quantize leaves in --out")
