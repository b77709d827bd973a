"""Linearised sensitivity: the noise of every layer, operand and width at once, from a few backward passes.

Quantizing one weight or one input moves it by a known ``d``, and the output, to first order, by ``J d``. With a random
``v`` of independent signs on the output

    E_v (v . J d)^2 = |J d|^2                    and          v . J d = (J^T v) . d,

and one backward pass gives ``J^T v`` for all weights and all layer inputs together. So ``P`` probes on a call cost
``P`` backward passes whatever the number of layers and widths, where the naive method repeats the call for each of
them. The relative standard deviation of an estimate over ``n`` probes and calls is about ``sqrt(2 / n)``.

Large errors (2 bits) are not linear; `dq_plugins.sensitivity.sensitivity_table` checks and corrects it on exact
measurements. The estimate is that of Hutchinson (1990), applied to ``J d d^T J^T``.

Shapes: ``B`` samples in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.calibration import CalibrationSet, first_tensor
from dq_plugins.errors import DQError
from dq_plugins.hooks import Arguments, hooked
from dq_plugins.quantized.candidates import Candidates, Entry
from dq_plugins.sensitivity.measure import BACKWARD, FORWARD, Sums
from dq_plugins.sensitivity.similarity import SsimForm
from dq_plugins.sensitivity.trajectory import Trajectory

CACHE_BYTES = 256 * 2**20
"""How much memory the weight errors of all widths may take; beyond it they are computed again at every probe."""


def signs(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Independent random signs, float32."""
    return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1


class JacobianProbe:
    """One differentiable call of the denoiser, and what every candidate would change in it.

    Args:
        denoiser: in eval mode; its weights get gradients only while the probe is open.
        candidates: the quantizers.
    """

    def __init__(self, denoiser: nn.Module, candidates: Candidates) -> None:
        self.denoiser, self.candidates = denoiser, candidates
        self._inputs: list[tuple[str, Tensor]] = []
        self._weights: dict[str, nn.Parameter] = {n: denoiser.get_submodule(n).weight for n in candidates.weights}  # type: ignore[misc]
        self._moved_weights: dict[str, Tensor] = {}
        self._cached = 0

    @contextmanager
    def open(self) -> Iterator[JacobianProbe]:
        """Hook the layers and let gradients through; everything is restored at the end."""
        required = {name: weight.requires_grad for name, weight in self._weights.items()}
        layers = {name: self.denoiser.get_submodule(name) for name in self.candidates.activations}
        try:
            for weight in self._weights.values():
                weight.requires_grad_(True)
            with hooked(layers, before=self._watch, first=True), torch.enable_grad():
                yield self
        finally:
            for name, weight in self._weights.items():
                weight.requires_grad_(required[name])
            self._inputs.clear()

    def _watch(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        # every layer gets its own tensor: q, k and v may share theirs
        own = args[0].view_as(args[0]) if args[0].requires_grad else args[0].detach().requires_grad_()
        self._inputs.append((name, own))
        return (own, *args[1:]), kwargs

    def run(self, kwargs: dict[str, Any]) -> Tensor:
        """First tensor of the output, with its graph."""
        self._inputs.clear()
        return first_tensor(self.denoiser(**kwargs))

    def backward(
        self, output: Tensor, cotangent: Tensor, timestep: Tensor, sample: Tensor | None = None
    ) -> tuple[dict[Entry, Tensor], Tensor | None]:
        """How far every candidate moves the probe ``cotangent . output``; the graph stays for more probes.

        Args:
            output: what `run` returned.
            cotangent: its shape.
            timestep: of the call.
            sample: an input whose gradient is wanted as well.

        Returns:
            By entry, float64 ``[n]``: one value a row of the layer's input, or one in all; and the gradient of the
            probe with respect to ``sample``.
        """
        names = list(self._weights)
        wanted = [*self._weights.values(), *(x for _, x in self._inputs), *([] if sample is None else [sample])]
        grads = torch.autograd.grad(output, wanted, cotangent, retain_graph=True, allow_unused=True)
        found: dict[Entry, Tensor] = {}
        with torch.no_grad():
            for name, grad in zip(names, grads, strict=False):
                for bits in self.candidates.weights[name]:
                    moved = 0.0 if grad is None else float((grad.double() * self._moved(name, bits)).sum())
                    _add(found, Entry(name, "weight", bits), torch.tensor([moved], dtype=torch.float64))
            for (name, x), grad in zip(self._inputs, grads[len(names) :], strict=False):
                for bits in self.candidates.activations[name]:
                    _add(found, Entry(name, "activation", bits), self._moved_input(name, bits, x, grad, timestep))
        return found, None if sample is None else grads[-1]

    def _moved(self, name: str, bits: int) -> Tensor:
        key = f"{name}@{bits}"
        if key in self._moved_weights:
            return self._moved_weights[key]
        weight = self._weights[name].detach()
        moved = self.candidates.fake_weight(name, bits, self.denoiser.get_submodule(name)).detach() - weight
        if self._cached + moved.nbytes <= CACHE_BYTES:
            self._moved_weights[key], self._cached = moved, self._cached + moved.nbytes
        return moved

    def _moved_input(self, name: str, bits: int, x: Tensor, grad: Tensor | None, timestep: Tensor) -> Tensor:
        if grad is None:
            return torch.zeros(1, dtype=torch.float64)
        layer = self.denoiser.get_submodule(name)
        moved = self.candidates.fake_input(name, bits, layer, x.detach(), timestep) - x.detach()
        change = grad.double() * moved
        return change.flatten(1).sum(1) if x.dim() > 1 else change.sum()[None]  # one value a row of x


def _add(sums: dict[Entry, Tensor], entry: Entry, values: Tensor) -> None:
    known = sums.get(entry)
    if known is not None and known.shape != values.shape:  # used with several batch sizes: only sums add up
        known, values = known.sum()[None], values.sum()[None]
    sums[entry] = values if known is None else known + values


def _fold(values: Tensor, batch: int) -> Tensor:
    # [rows] -> [B]; one sum in all where rows do not divide by samples
    return values.reshape(batch, -1).sum(1) if values.numel() % batch == 0 else values.sum()[None]


@dataclass
class QualityProbes:
    """Noise power that each entry adds to the denoiser's output, one recorded call at a time.

    Attributes:
        denoiser: full precision.
        candidates: the quantizers.
        calibration: recorded calls.
        probes: backward passes for each call.
        seed: of the probes.
    """

    denoiser: nn.Module
    candidates: Candidates
    calibration: CalibrationSet
    probes: int = 4
    seed: int = 0

    def units(self) -> list[str]:
        """One unit of work for each recorded call."""
        return [str(call.index) for call in self.calibration.calls()]

    @cached_property
    def _jacobian(self) -> JacobianProbe:
        return JacobianProbe(self.denoiser, self.candidates)

    def __call__(self, unit: str) -> Sums:
        """Estimated ``sum (y - y^)^2`` by entry, and the signal ``sum y^2``, of one call."""
        (call,) = self.calibration.subset(calls=[int(unit)]).calls()
        generator = torch.Generator().manual_seed(_seed(self.seed, unit))
        sums: Sums = {"calls": FORWARD + BACKWARD * self.probes}
        with self._jacobian.open() as jacobian:
            output = jacobian.run(call.kwargs)
            sums["signal"] = float(output.detach().double().square().sum())
            for _ in range(self.probes):
                cotangent = signs(output.shape, generator).to(output)
                for entry, moved in jacobian.backward(output, cotangent, call.timestep)[0].items():
                    power = float(_fold(moved, output.shape[0]).square().sum()) / self.probes
                    sums[str(entry)] = sums.get(str(entry), 0.0) + power
        return sums


@dataclass
class ContentProbes:
    """Loss of similarity of the final sample that each entry causes, one recorded sampling run at a time.

    The probe starts at the final sample, in the coordinates in which ``1 - SSIM`` is a sum of squares, and is carried
    back through the sampler (whose steps are read off the recording) and the denoiser, summing up on the way what each
    entry changes at every step.

    Attributes:
        denoiser: full precision.
        candidates: the quantizers.
        trajectories: recorded sampling runs.
        probes: backward passes through a run for each of the two parts (structure, texture).
        seed: of the probes.
    """

    denoiser: nn.Module
    candidates: Candidates
    trajectories: Sequence[Trajectory]
    probes: int = 4
    seed: int = 0

    def units(self) -> list[str]:
        """One unit of work for each sampling run."""
        return [str(index) for index in range(len(self.trajectories))]

    @cached_property
    def _jacobian(self) -> JacobianProbe:
        return JacobianProbe(self.denoiser, self.candidates)

    def __call__(self, unit: str) -> Sums:
        """Estimated loss of structure (``<entry>#structure``) and of texture (``#texture``), summed over images."""
        trajectory = self.trajectories[int(unit)]
        generator = torch.Generator().manual_seed(_seed(self.seed, unit))
        form = SsimForm(trajectory.final())
        sums: Sums = {"signal": float(trajectory.final().shape[0]), "calls": 0.0}
        for part in ("structure", "texture"):
            for _ in range(self.probes):
                probe = form.cotangent(part, signs(trajectory.final().shape, generator))
                for entry, moved in self._carry_back(trajectory, probe, sums).items():
                    key = f"{entry}#{part}"
                    sums[key] = sums.get(key, 0.0) + float(moved.square().sum()) / self.probes
        return sums

    def _carry_back(self, trajectory: Trajectory, probe: Tensor, sums: Sums) -> dict[Entry, Tensor]:
        """What each entry moves the probe by, over all steps of the run: float64, one value an image or one in all."""
        total: dict[Entry, Tensor] = {}
        with self._jacobian.open() as jacobian:
            for step in reversed(range(trajectory.steps)):
                call = trajectory.call(step)
                sample = call.kwargs[trajectory.argument].clone().requires_grad_()  # [N, ...]
                output = jacobian.run({**call.kwargs, trajectory.argument: sample})
                onto_output, onto_sample = trajectory.split(step, probe, output)
                response, gradient = jacobian.backward(output, onto_output, call.timestep, sample)
                sums["calls"] += FORWARD + BACKWARD
                for entry, moved in response.items():
                    _add(total, entry, trajectory.per_image(_fold(moved, output.shape[0])))
                if gradient is None:
                    raise DQError("the denoiser's output does not depend on its sample: nothing to carry back")
                probe = onto_sample + trajectory.fold(gradient)
        return total


def _seed(seed: int, unit: str) -> int:
    return (seed * 1_000_003 + int(unit)) % 2**63
