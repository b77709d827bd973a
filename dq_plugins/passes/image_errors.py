"""What a plan does to the final images of recorded sampling runs: they are repeated, from the same noise."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dq_plugins.errors import CalibrationError
from dq_plugins.plan import QuantPlan
from dq_plugins.quantized.run import planned_run, planned_states
from dq_plugins.recipe import PassContext
from dq_plugins.sensitivity.exact_noise import replayed_errors
from dq_plugins.sensitivity.trajectory import Trajectory, trajectories_of


def image_errors(plan: QuantPlan, context: PassContext, runs: Sequence[Trajectory]) -> Tensor:
    """Mean square error of every final sample with a plan, fake-quantized: float64 ``[images]``."""
    run = planned_run(context.denoiser, plan, whole=True, out_of_range="nearest")
    states = planned_states(run, plan)
    with run:
        run.use(states)
        return replayed_errors(context.denoiser, runs)


def whole_runs(context: PassContext, most: int) -> list[Trajectory]:
    """The first recorded sampling runs, at most so many; none where the recording holds no whole run."""
    try:
        return trajectories_of(context.calibration, context.partition.sample_argument)[:most]
    except CalibrationError:
        return []
