"""What one larger step costs in the final image, for every pair of recorded timesteps; measured once.

From the recorded sample and output at timestep i the sampler steps to j, and misses the recorded sample there by
``e_ij``. Carried through the rest of the (full-precision) run this moves the final image by ``J_j e_ij``, to first
order.
With probes ``v`` of random signs on the final image and ``g_j = J_j' v``, one backward pass through the run for each,

    d_ij^2 = E_v (g_j . e_ij)^2 / D                     mean square over the D pixels of the final image

for all pairs at once: the pairs themselves need no denoiser call. In the same way quantization noise of relative power
``n`` on the output at i, through the step's factor ``B_ij``, ends as

    q_ij n = B_ij^2 mean(y_i^2) E_v |g_j|^2 / D * n.

The rest of the run is linearised over the recorded nodes with one-step updates, so multistep solvers are approximated.

Shapes: ``n`` nodes; ``M`` images; ``P`` probes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from dq_plugins.calibration import first_tensor
from dq_plugins.passes.steps.runs import Run, recorded_path
from dq_plugins.passes.steps.stepper import Stepper
from dq_plugins.progress import Progress, reported

END = -1
"""The final image, as the node after the last timestep."""


@dataclass(eq=False)
class Transitions:
    """Costs of steps between recorded timesteps; made by `measure_transitions`.

    Attributes:
        nodes: timesteps, ascending.
        samples: ``[n + 1, M, ...]``: at every node, and the final images.
        outputs: ``[n, M, ...]``, guided.
        gradients: ``[n + 1, P, M, ...]``: of the probes with respect to the samples.
        starts: ``[n, M, ...]``: what a run that begins at a node begins with.
        stepper: the sampler.
        calls: what was measured, in denoiser calls of one image (a backward pass counts as two).
    """

    nodes: tuple[float, ...]
    samples: Tensor
    outputs: Tensor
    gradients: Tensor
    starts: Tensor
    stepper: Stepper
    calls: float
    _known: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict, repr=False)

    def start(self, node: int) -> float:
        """``d`` of beginning at a node with the noise that the recorded run began with, rather than its sample."""
        return self._moved(node, self.starts[node] - self.samples[node])

    def error(self, start: int, end: int) -> float:
        """``d_ij``: root mean square of what the step moves the final image by."""
        return self._pair(start, end)[0]

    def gain(self, start: int, end: int) -> float:
        """``q_ij``: mean square error of the final image for relative noise power 1 of the output at ``start``."""
        return self._pair(start, end)[1]

    def change(self) -> list[float]:
        """At every node, the error of stepping over the next one: how much the trajectory bends there."""
        errors = [self.error(i, i - 2 if i > 1 else END) for i in range(len(self.nodes))]
        # stepping over nothing is not a measure of the last node: it shares its neighbour's
        return [errors[min(1, len(errors) - 1)], *errors[1:]]

    def _pair(self, start: int, end: int) -> tuple[float, float]:
        if (start, end) not in self._known:
            self._known[start, end] = self._measure(start, end)
        return self._known[start, end]

    @torch.no_grad()
    def _measure(self, start: int, end: int) -> tuple[float, float]:
        timesteps = (self.nodes[start],) if end == END else (self.nodes[start], self.nodes[end])
        sample, output = self.samples[start], self.outputs[start]
        reached = self.stepper.begin(timesteps).step(0, output, sample)
        # one generator seed inside the stepper: noise of a stochastic step cancels in the difference
        nudge = 1e-2 * output
        nudged = self.stepper.begin(timesteps).step(0, output + nudge, sample)
        factor = float((nudged - reached).double().square().sum() / nudge.double().square().sum().clamp(min=1e-30))
        power = float(output.double().square().mean())
        gradient = float(self.gradients[end].double().square().flatten(2).sum(2).mean()) / self._pixels
        return self._moved(end, reached - self.samples[end]), factor * power * gradient

    @property
    def _pixels(self) -> int:
        return self.samples[0, 0].numel()

    def _moved(self, node: int, error: Tensor) -> float:
        """Root mean square of what an error ``[M, ...]`` at a node moves the final image by."""
        moved = (self.gradients[node].double() * error.double()).flatten(2).sum(2)
        return float(np.sqrt(float(moved.square().mean()) / self._pixels))


def measure_transitions(
    denoiser: nn.Module,
    stepper: Stepper,
    runs: Sequence[Run],
    nodes: Sequence[float],
    *,
    probes: int = 2,
    generator: torch.Generator,
) -> Generator[Progress, None, Transitions]:
    """Measure; iterate to run, the generator returns `Transitions`.

    Args:
        denoiser: full precision.
        stepper: the sampler.
        runs: recorded runs.
        nodes: recorded timesteps to step between, ascending.
        probes: ``P``.
        generator: of the probes.
    """
    parts = []
    total = len(runs) * len(nodes)
    for index, run in enumerate(runs):
        signs = torch.randint(2, (probes, *run.final.shape), generator=generator) * 2.0 - 1
        measuring = _one_run(denoiser, stepper, run, nodes, signs.to(run.final))
        done = index * len(nodes)
        part = yield from reported(
            measuring, lambda node, done=done: Progress(done + node, total, "what larger steps cost")
        )
        parts.append(part)
    samples, outputs, gradients, starts = (
        torch.cat(tensors, dim) for tensors, dim in zip(zip(*parts, strict=True), (1, 1, 2, 1), strict=True)
    )
    calls = float(len(nodes) * samples.shape[1] * (1 + 2 * probes))
    return Transitions(tuple(nodes), samples, outputs, gradients, starts, stepper, calls)


def _one_run(
    denoiser: nn.Module, stepper: Stepper, run: Run, nodes: Sequence[float], signs: Tensor
) -> Generator[int, None, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Samples, outputs, gradients and starts of one run; yields how many nodes are done."""
    recorded, guided = recorded_path(run, stepper)
    places = [run.trajectory.calibration.schedule.timesteps.index(t) for t in nodes]
    samples = torch.stack([recorded[p] for p in places] + [recorded[-1]])
    outputs = torch.stack([guided[p] for p in places])
    starts = torch.stack([run.noise * stepper.begin((t,)).spread for t in nodes])
    gradients = [signs]
    for i, t in enumerate(nodes):
        timesteps = (t,) if i == 0 else (t, nodes[i - 1])
        gradients.append(_carried_back(denoiser, stepper, run, timesteps, samples[i], gradients[-1]))
        yield i + 1
    # `gradients[0]` is that of the final images, the node after the last timestep
    return samples, outputs, torch.stack([*gradients[1:], gradients[0]]), starts


def _carried_back(
    denoiser: nn.Module, stepper: Stepper, run: Run, timesteps: tuple[float, ...], sample: Tensor, onto: Tensor
) -> Tensor:
    """Gradients ``[P, M, ...]`` with respect to the sample before a step, from those with respect to the next one."""
    with torch.enable_grad():
        before = sample.clone().requires_grad_()
        begun = stepper.begin(timesteps)
        output = run.guide(
            first_tensor(denoiser(**run.arguments(begun.scale(0, before), timesteps[0]))), stepper.guidance
        )
        after = begun.step(0, output, before)
        found = [torch.autograd.grad(after, before, probe.to(after), retain_graph=True)[0] for probe in onto]
    return torch.stack(found).detach()
