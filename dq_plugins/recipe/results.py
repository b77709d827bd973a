"""What each step of a recipe leaves on disk, so that an interrupted run goes on after the last finished step."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from dq_plugins.errors import DQError
from dq_plugins.hashing import hash_json
from dq_plugins.plan import QuantPlan, load_plan, save_plan
from dq_plugins.recipe.context import PassContext
from dq_plugins.recipe.recipe import Step

_MARKER = "done.json"


class StepResults:
    """The folders of a recipe's steps, each with the plan as the step left it.

    A folder counts as finished when its marker holds the step's signature: a hash of everything that determined the
    plan up to and including that step. The marker is written last.

    Args:
        root: folder of the run; None: nothing is kept, and nothing is found.
        steps: of the recipe, in order.
        context: of the run.
        model_hash: of the denoiser's weights.
    """

    def __init__(self, root: str | Path | None, steps: tuple[Step, ...], context: PassContext, model_hash: str) -> None:
        given = [model_hash, context.calibration.hash, asdict(context.targets), context.seed]
        described = [[s.name, dict(s.options)] for s in steps]
        self._signatures = [hash_json([given, described[: i + 1]]) for i in range(len(steps))]
        self._folders = None if root is None else [Path(root) / f"{i:02d}-{s.name}" for i, s in enumerate(steps)]

    def last(self) -> tuple[int, QuantPlan | None]:
        """Number of finished steps, and the plan after the last of them."""
        if self._folders is None:
            return 0, None
        for i in reversed(range(len(self._folders))):
            marker = self._folders[i] / _MARKER
            try:
                if json.loads(marker.read_text())["signature"] == self._signatures[i]:
                    return i + 1, load_plan(self._folders[i])
            except (OSError, ValueError, KeyError, DQError):
                continue  # absent, of another run, or cut off while it was written: that step runs again
        return 0, None

    def folder(self, step: int) -> Path | None:
        """Folder of a step, made if it is not there, for its own intermediate results."""
        if self._folders is None:
            return None
        self._folders[step].mkdir(parents=True, exist_ok=True)
        return self._folders[step]

    def keep(self, step: int, plan: QuantPlan) -> None:
        """Mark a step as finished with ``plan``."""
        folder = self.folder(step)
        if folder is not None:
            save_plan(plan, folder)
            (folder / _MARKER).write_text(json.dumps({"signature": self._signatures[step]}))
