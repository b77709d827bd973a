"""What each step of a recipe leaves on disk, so that an interrupted run goes on after the last finished step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dq_plugins import registry
from dq_plugins.errors import PlanError
from dq_plugins.plan import PLAN, QuantPlan
from dq_plugins.plan.quant_plan import PLAN_NAME
from dq_plugins.recipe.definition import Step
from dq_plugins.recipe.pass_context import PassContext

log = logging.getLogger(__name__)


class StepResults:
    """The folders of a recipe's steps, each with the plan as the step left it.

    A step counts as finished when its folder holds a plan of its settings: of everything that determined the plan up
    to and including that step.

    Args:
        root: folder of the run; None: nothing is kept, and nothing is found.
        steps: of the recipe, in order.
        context: of the run.
        model_hash: of the denoiser's weights.
    """

    def __init__(self, root: str | Path | None, steps: tuple[Step, ...], context: PassContext, model_hash: str) -> None:
        given = {
            "weights": model_hash,
            "calibration": context.calibration.hash,
            "targets": context.targets,
            "seed": context.seed,
        }
        described = [
            {"pass": s.name, "options": dict(s.options), "version": registry.find("pass", s.name).version}
            for s in steps
        ]
        self._settings: list[dict[str, Any]] = [{**given, "steps": described[: i + 1]} for i in range(len(steps))]
        self._folders = None if root is None else [Path(root) / f"{i:02d}-{s.name}" for i, s in enumerate(steps)]

    def last(self) -> tuple[int, QuantPlan | None]:
        """Number of finished steps, and the plan after the last of them."""
        if self._folders is None:
            return 0, None
        for i in reversed(range(len(self._folders))):
            path = self._folders[i] / PLAN_NAME
            try:
                plan = PLAN.find(path, self._settings[i])
                if plan is not None:
                    return i + 1, plan
                if i == 0 and path.exists():
                    others = ", ".join(PLAN.differing(path, self._settings[i]))
                    log.warning("%s is of a run with other settings (%s): its steps run again", path.parent, others)
            except PlanError:
                continue  # damaged: that step runs again
        return 0, None

    def folder(self, step: int) -> Path | None:
        """Folder of a step, made if it is not there, for its own intermediate results."""
        if self._folders is None:
            return None
        self._folders[step].mkdir(parents=True, exist_ok=True)
        return self._folders[step]

    def keep(self, step: int, plan: QuantPlan) -> None:
        """Keep the plan of a finished step."""
        folder = self.folder(step)
        if folder is not None:
            plan.save(folder, self._settings[step])
