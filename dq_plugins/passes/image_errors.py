"""What a plan, or a layer, does to the final images of recorded sampling runs.

Those of a plan are repeated, from the same noise. Those of layers are measured all at once, to first order: random
probes of the image are carried back through a run (`dq_plugins.sensitivity.drift`).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

from torch import Tensor

from dq_plugins.artifact import UnitResults
from dq_plugins.errors import CalibrationError
from dq_plugins.passes.shared_inputs import targets_of
from dq_plugins.plan import DynamicActivationQuant, QuantPlan
from dq_plugins.quantized.candidates import Candidates
from dq_plugins.quantized.run import planned_run, planned_states
from dq_plugins.quantized.weight_scale import layer_quantizer
from dq_plugins.recipe import PassContext, Progress
from dq_plugins.sensitivity.drift import DriftProbes, ImageError, image_error
from dq_plugins.sensitivity.exact_noise import replayed_errors
from dq_plugins.sensitivity.jacobian import CHUNK_BYTES
from dq_plugins.sensitivity.measure import MEASURED, measure
from dq_plugins.sensitivity.trajectory import Trajectory, trajectories_of

PROBES = 4
"""Random probes of the image, carried back through one run."""


def image_errors(plan: QuantPlan, context: PassContext, runs: Sequence[Trajectory]) -> Tensor:
    """Mean square error of every final sample with a plan, fake-quantized: float64 ``[images]``."""
    run = planned_run(context.denoiser, plan, whole=True, out_of_range="nearest")
    states = planned_states(run, plan)
    with run:
        run.use(states)
        return replayed_errors(context.denoiser, runs)


def errors_by_layer(
    plan: QuantPlan, context: PassContext, layers: Sequence[str]
) -> Generator[Progress, None, dict[str, float] | None]:
    """Mean square error of the final image that each layer makes alone at the targets of a run; None where the
    recording holds no whole sampling run.

    It needs no ranges: weights are rounded to nearest, inputs have dynamic ranges.

    Args:
        plan: roles and transforms count.
        context: the run.
        layers: linear layers and convolutions, by name.
    """
    runs = whole_runs(context, 1, required=False)
    if not runs or not layers:
        return None
    transforms = {name: context.transforms[name] for name in layers if name in context.transforms}
    weights, inputs = {}, {}
    for name in layers:
        layer, targets = context.denoiser.get_submodule(name), targets_of(name, plan, context)
        quant = layer_quantizer(layer, targets.weight_bits, targets, transform=transforms.get(name))
        weights[name] = {targets.weight_bits: quant}
        if targets.act_bits is not None and targets.act_bits > 1:
            inputs[name] = {targets.act_bits: DynamicActivationQuant(targets.act_bits, targets.symmetric_acts)}
    candidates = Candidates(weights, inputs, {}, transforms, plan.row_orders)
    found = dict.fromkeys(layers, 0.0)
    for entry, error in (yield from candidate_errors(context, candidates, runs, PROBES)).alone().items():
        found[entry.layer] += error
    return found


def candidate_errors(
    context: PassContext,
    candidates: Candidates,
    runs: Sequence[Trajectory],
    probes: int,
    *,
    by_group: bool = False,
) -> Generator[Progress, None, ImageError]:
    """What each quantizer does to the final image; kept in the run's working folder.

    Args:
        context: the run.
        candidates: the quantizers.
        runs: recorded sampling runs.
        probes: random probes of the image.
        by_group: inputs in each timestep group by themselves.
    """
    parts = image_parts(context, runs, probes)
    measured = DriftProbes(context.denoiser, candidates, parts, probes, context.stream("image"), by_group)
    settings = {
        "candidates": candidates.hash,
        "calls": context.calibration.hash,
        "probes": probes,
        "parts": [part.images for part in parts],
        "by_group": by_group,
    }
    kept = UnitResults(MEASURED, context.workdir and context.workdir / "measurements", settings)
    results = yield from measure(measured, kept, what="image, by group" if by_group else "image, by layer")
    return image_error(results, measured.entries())


def image_parts(context: PassContext, runs: Sequence[Trajectory], probes: int) -> list[Trajectory]:
    """The runs, a few images at a time, so that the gradients of all probes fit `CHUNK_BYTES` where one image's do.

    ``probes`` are the random ones; the directions of drift are carried back with them.
    """
    rows, channels = context.calibration.example_inputs()[context.partition.sample_argument].shape[:2]
    layers = context.partition.layers.values()
    numbers = sum(math.prod(info.input_shape) + math.prod(info.output_shape) for info in layers) / rows  # of a row
    most = CHUNK_BYTES / (4 * numbers * (probes + channels + 1))  # rows
    return [part for run in runs for part in run.parts(max(int(most / run.branches), 1))]


def whole_runs(context: PassContext, most: int | None = None, *, required: bool = True) -> list[Trajectory]:
    """The first recorded sampling runs, at most so many.

    Raises:
        CalibrationError: the recording holds no whole run, and one is required; else there are none.
    """
    try:
        return trajectories_of(context.calibration, context.partition.sample_argument)[:most]
    except CalibrationError:
        if required:
            raise
        return []
