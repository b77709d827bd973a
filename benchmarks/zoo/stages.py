"""What every denoiser of the zoo goes through, stage by stage, and what is found on the way.

call, partition, record, plan (recipe ``fast``), simulate, integers (torchao), save and load. A stage that fails ends
it; its error is part of the result.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import dq_plugins as dq
from benchmarks.zoo.specimen import Inputs, Specimen
from dq_plugins.graph.arguments import find_timestep_argument, map_leaves, tensors_of
from dq_plugins.plan import QuantPlan

STAGES = ("call", "partition", "record", "plan", "simulate", "integers", "reload")
FRACTIONS = (1.0, 0.5, 0.1)
"""Timesteps of the calibration, over that of the example call."""


@dataclass
class Outcome:
    """How far one denoiser goes, and what it is then.

    Attributes:
        name: of its class.
        failed: the first stage that fails; empty where none does.
        error: what it raised, or the cause outside this project.
        outside: whether the cause lies outside this project.
        tracer: what found the graph.
        parameters: of the denoiser.
        temporal, condition, sample: layers that depend on the timestep alone, on conditions, on the sample.
        integer: layers that run in integers.
        share: of the parameters that they hold, 0 to 1.
        other: what stays, by reason: number of layers.
        integer_error: relative difference of the output in integers from the simulated one.
        quantized_error: of the simulated one from full precision.
    """

    name: str
    failed: str = ""
    error: str = ""
    outside: bool = False
    tracer: str = ""
    parameters: int = 0
    temporal: int = 0
    condition: int = 0
    sample: int = 0
    integer: int = 0
    share: float = 0.0
    other: dict[str, int] = field(default_factory=dict)
    integer_error: float = 0.0
    quantized_error: float = 0.0

    def record(self) -> dict[str, Any]:
        """As data."""
        return asdict(self)


def run_stages(name: str, cls: type[nn.Module], specimen: Specimen) -> Outcome:
    """Take one denoiser through every stage."""
    found = Outcome(name)
    with TemporaryDirectory() as folder:
        for stage, run in _stages(cls, specimen, found, Path(folder)):
            try:
                run()
            except Exception as error:  # whatever the model's code raises; the stage is what counts
                found.failed = stage
                place = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
                found.error, found.outside = specimen.outside.get(stage, text), stage in specimen.outside
                break
    return found


def _stages(cls: type[nn.Module], specimen: Specimen, found: Outcome, folder: Path) -> Any:
    state: dict[str, Any] = {}
    inputs = specimen.draw()

    def call() -> None:
        state["model"] = model = specimen.build(cls)
        found.parameters = sum(p.numel() for p in model.parameters())
        state["reference"] = outputs(model, inputs, timestep_of(model, specimen))

    def partition() -> None:
        part = dq.partition(state["model"], inputs, timestep=specimen.timestep, sample=specimen.sample)
        found.tracer = part.graph.graph["tracer"]
        found.temporal, found.condition = len(part.temporal), len(part.condition | part.mixed)
        found.sample = len(part.sample)

    def record() -> None:
        model = state["model"]
        timestep = timestep_of(model, specimen)

        def sample(denoiser: nn.Module) -> None:
            for fraction in FRACTIONS:
                denoiser(**at(inputs, timestep, fraction))

        state["calls"] = dq.record(model, sample, folder / "calls", progress=False, timestep=specimen.timestep)

    def plan() -> None:
        options = {"sample": specimen.sample} if specimen.sample else {}
        state["plan"] = dq.make_plan(state["model"], state["calls"], "fast", progress=False, **options)

    def simulate() -> None:
        state["simulated"] = outputs(apply(state, "simulate"), inputs, state["plan"].timestep_argument)
        found.quantized_error = relative(state["simulated"], state["reference"])

    def integers() -> None:
        model = state["quantized"] = apply(state, "torchao")
        state["integers"] = outputs(model, inputs, state["plan"].timestep_argument)
        found.integer_error = relative(state["integers"], state["simulated"])
        describe(model, found)

    def reload() -> None:
        from dq_torchao import load, save

        save(state["quantized"], folder / "saved")
        loaded = load(specimen.build(cls, seed=1), folder / "saved")
        again = outputs(loaded, inputs, state["plan"].timestep_argument)
        if not all(torch.equal(a, b) for a, b in zip(again, state["integers"], strict=True)):
            raise AssertionError(f"the loaded denoiser differs by {relative(again, state['integers']):.2g}")

    return zip(STAGES, (call, partition, record, plan, simulate, integers, reload), strict=True)


def timestep_of(model: nn.Module, specimen: Specimen) -> str:
    """Name of the timestep argument."""
    return find_timestep_argument(model, specimen.timestep)


def at(inputs: Inputs, timestep: str, fraction: float) -> Inputs:
    """The arguments at another timestep; what a call may change is copied."""

    def moved(name: str, value: Any) -> Any:
        if name != timestep:
            return copy.deepcopy(value)
        return value * fraction if value.is_floating_point() else (value * fraction).to(value.dtype)

    return map_leaves(inputs, moved)


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs, timestep: str) -> list[Tensor]:
    """Every tensor of the outputs at the calibrated timesteps."""
    return [y for fraction in FRACTIONS for y in tensors_of(model(**at(inputs, timestep, fraction)))]


def relative(found: list[Tensor], reference: list[Tensor]) -> float:
    """Root of the squared error over the squared reference, of all tensors together."""
    pairs = [(a.float(), b.float()) for a, b in zip(found, reference, strict=True)]
    error, size = (sum(float(x.pow(2).sum()) for x in xs) for xs in ([a - b for a, b in pairs], [b for _, b in pairs]))
    return (error / max(size, 1e-30)) ** 0.5


def apply(state: Mapping[str, Any], backend: str) -> nn.Module:
    """A quantized copy."""
    plan: QuantPlan = state["plan"]
    return dq.apply(copy.deepcopy(state["model"]), plan, backend=backend)


def describe(model: nn.Module, found: Outcome) -> None:
    """How the layers of a quantized denoiser run."""
    from dq_torchao import execution_report
    from dq_torchao.packed_weight import PackedWeight

    held = 0
    for name, how in execution_report(model).items():
        if how.state == "integer":
            found.integer += 1
            layer: Any = model.get_submodule(name)
            held += layer.weight_codes.numel() if isinstance(layer, PackedWeight) else 0
        else:
            reason = f"{how.state}: {how.reason or 'no reason'}"
            found.other[reason] = found.other.get(reason, 0) + 1
    found.share = held / max(1, found.parameters)
