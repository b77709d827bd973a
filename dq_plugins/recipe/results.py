"""What each step of a recipe leaves on disk, so that an interrupted run goes on after the last finished step."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dq_plugins.artifact.files import Mapped
from dq_plugins.errors import ArtifactError, PlanError, RecipeError
from dq_plugins.exclusive import exclusive
from dq_plugins.plan import PLAN, QuantPlan
from dq_plugins.plan.quant_plan import PLAN_NAME
from dq_plugins.recipe.run_settings import RUN, RUN_NAME, RunSettings, of_last_step, per_step
from dq_plugins.scratch import is_scratch, remove_abandoned

log = logging.getLogger(__name__)

WORK_NAME = "work"
_STEP = re.compile(r"\d\d-.+")


class StepResults:
    """The folders of a recipe's steps, each with the plan as the step left it.

    A step counts as finished when its folder holds a plan of its settings: of everything that determined the plan up
    to and including that step. The folder belongs to one run: `opened` refuses it to a run of other settings.

    Args:
        root: folder of the run; None: nothing is kept, and nothing is found.
        settings: of the run.
        out: folder for the finished plan; None: it stays with the last step.
        mapped: where the tensors of plans that are read are, see `dq_plugins.artifact.files.Mapped`.
    """

    def __init__(
        self, root: str | Path | None, settings: RunSettings, out: str | Path | None = None, mapped: Mapped = False
    ) -> None:
        self.settings, self._per_step, self._mapped = settings, per_step(settings), mapped
        self._out = None if out is None else Path(out)
        self._root = self._out / WORK_NAME if self._out is not None and root is None else root and Path(root)
        names = [f"{i:02d}-{name}" for i, name in enumerate(settings.passes)]
        self._folders = None if self._root is None else [self._root / name for name in names]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep other processes out, and take the folder for this run.

        Raises:
            DQError: another process works there, or the folder cannot be made or written to.
            RecipeError: the folder holds intermediate results of other settings; the message names them.
        """
        if self._root is None:
            yield
            return
        with exclusive(self._root):
            remove_abandoned(self._out or self._root)
            if self._finished() is None:
                self._say_what_goes()
                self._claim(self._root)
            for folder in [each for each in self._root.rglob("*") if each.is_dir() and not is_scratch(each)]:
                remove_abandoned(folder)
            yield

    def _say_what_goes(self) -> None:
        """Warn of a finished plan of another run, in whose place this run's plan will be."""
        if self._out is None or not (self._out / PLAN_NAME).exists():
            return
        try:
            found = of_last_step(PLAN.settings_of(self._out / PLAN_NAME))
        except ArtifactError:
            return  # damaged
        others = [] if found is None else self.settings.differences(found) or self.settings.other_code(found)
        what = "; ".join(others) or "it was changed or saved by hand"
        log.warning("%s holds a finished plan of another run (%s), which this one will replace", self._out, what)

    def _claim(self, root: Path) -> None:
        found = _claimed(root)
        if found is not None and (others := self.settings.differences(found)):
            raise RecipeError(
                f"{root} holds the intermediate results of another run: {'; '.join(others)}. Give the settings of "
                f"there to finish that run, choose another folder, or delete {root} to give it up."
            )
        if found is not None and (code := self.settings.other_code(found)):
            log.warning("%s is of other code (%s): everything runs again", root, "; ".join(code))
            for left in [each for each in root.iterdir() if each.is_dir() and _STEP.fullmatch(each.name)]:
                shutil.rmtree(left)
        if found != self.settings:
            RUN.write(root / RUN_NAME, self.settings)

    def _finished(self) -> QuantPlan | None:
        """The plan of these settings, if it is whole already."""
        if self._out is None:
            return None
        try:
            return PLAN.find(self._out / PLAN_NAME, self._per_step[-1], mapped=self._mapped)
        except PlanError:
            return None  # damaged: it is made again

    def last(self) -> tuple[int, QuantPlan | None]:
        """Number of finished steps, and the plan after the last of them."""
        if (plan := self._finished()) is not None:
            return len(self._per_step), plan
        for i in reversed(range(len(self._folders or ()))):
            try:
                path = self._folders[i] / PLAN_NAME  # type: ignore[index]
                plan = PLAN.find(path, self._per_step[i], mapped=self._mapped)
                if plan is not None:
                    return i + 1, plan
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
            plan.save(folder, self._per_step[step])

    def finish(self, plan: QuantPlan) -> None:
        """Put the finished plan where it was wanted. Then intermediate results go, unless they are another run's."""
        if self._out is None or self._root is None:
            return
        if self._finished() is None:
            plan.save(self._out, self._per_step[-1])
        if self._root.exists() and _claimed(self._root) in (None, self.settings):
            shutil.rmtree(self._root)


def _claimed(root: Path) -> RunSettings | None:
    """The run that a folder belongs to; None where it does not say, or where that file is damaged or too old."""
    try:
        return RUN.read(root / RUN_NAME) if (root / RUN_NAME).exists() else None
    except ArtifactError:
        return None  # the steps say for themselves what they are of
