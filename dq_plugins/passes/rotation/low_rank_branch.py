"""Pass ``low-rank``: a branch of small rank, in floating point or in 8 bits, that takes what few bits cannot.

    f(x, w)  ~  f(Q(x'), Q(w'))  +  f(x, l)              w' of w - l,  l = up down

The branch multiplies the input as it comes, so the error of the quantized input meets the rest of the weight only.

Which l is best is measured, layer by layer, among

    "weight"            the largest singular vectors of the weight after balancing   (Li et al. 2024, SVDQuant)
    "error"             those of the weight's quantization error                      (Guo et al. 2023, LQ-LoRA)
    "weighted-error"    the same, whitened by the second moments of the input: least error of the output
                        (Zhang et al. 2024, QERA)

Shapes: ``O`` outputs, ``K`` products per output, ``r`` rank, ``R`` rows of the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from dq_plugins import registry
from dq_plugins.errors import RecipeError
from dq_plugins.passes.rotation.held_out_error import InputRows, held_out_error
from dq_plugins.passes.rotation.sampled_inputs import SampledInputs
from dq_plugins.passes.shared_inputs import layers_by_input, targets_of
from dq_plugins.plan import LowRank, QuantPlan, Targets
from dq_plugins.quantized.layer_transform import LayerTransform, transformed_weight
from dq_plugins.quantized.rotate import Rotate
from dq_plugins.quantized.weight_scale import layer_quantizer
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.solvers.program import ChoiceProgram
from dq_plugins.solvers.solution import Solution

LowRankMethod = Literal["weight", "error", "weighted-error"]
DAMPING = 1e-2
"""Of the second moments, as a share of their mean diagonal."""


class Offer(NamedTuple):
    """A branch that a layer may have, or none, and the error that it leaves of the layer's output over its power."""

    error: float
    branch: LowRank | None

    @property
    def bytes(self) -> int:
        """What the branch takes."""
        return 0 if self.branch is None else self.branch.nbytes


class LowRankBranch(Pass):
    """Add a low-rank branch of 16 or 8 bits to weights, where it lowers the error of the layer's output."""

    name = "low-rank"
    after = ("calibration-timesteps", "channel-balance", "rotation")

    class Options(PassOptions):
        """Options of ``low-rank``.

        Attributes:
            ranks: what r may be. One alone is that of every layer; several are shared out under ``bytes``.
            bytes: what all branches may take together; the ranks of least summed error are found exactly.
            bits: of both matrices: 16, in floating point, or 8, codes with a scale for each direction.
            methods: what is tried beside none.
            most: largest share of a layer's weights that the branch may have; layers where r is more have none.
            most_bits: wider weights have none.
            calls: recorded calls to learn from, spread evenly over the recording.
            rows: rows of a layer's input that count, for each call.
            groups: timestep groups with ranges of their own, by which branches are compared.
            least_gain: share of its error that a layer must lose, or it stays as it is.
            solver: that shares out the bytes.
        """

        ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field((16,), min_length=1)
        bytes: int | None = Field(None, ge=0)
        bits: Literal[8, 16] = 16
        methods: tuple[LowRankMethod, ...] = Field(("weight", "weighted-error"), min_length=1)
        most: float = Field(0.25, gt=0, le=1)
        most_bits: int = Field(6, ge=1, le=16)
        calls: int = Field(25, ge=1)
        rows: int = Field(24, ge=1)
        groups: int = Field(8, ge=1)
        least_gain: float = Field(0.1, ge=0, lt=1)
        solver: str = "cp-sat"

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Sample the inputs in one sweep, try the branches layer by layer, and share out the bytes."""
        if len(self.options.ranks) > 1 and self.options.bytes is None:
            raise RecipeError("low-rank: several ranks are shared out under a budget; give the option 'bytes' too")
        ranks = {n: self._ranks(n, plan, context) for names in layers_by_input(context) for n in names}
        names = [name for name, fitting in ranks.items() if fitting]
        calls = context.calibration.spread(self.options.calls)
        sampled = SampledInputs(context.denoiser, names, self.options.rows)
        for done, call in enumerate(calls.calls() if names else ()):
            yield Progress(done, len(calls) + len(names), "inputs")
            sampled.see(call, context.generator("rows", str(call.index)))
        offers = {}
        for done, name in enumerate(names):
            yield Progress(len(calls) + done, len(calls) + len(names), name)
            rows = sampled.rows_of(name, self.options.groups)
            layer, transform = context.denoiser.get_submodule(name), context.transforms.get(name)
            targets = targets_of(plan.layers[name], context.targets)
            offers[name] = self._offers(*rows, layer, transform, targets, ranks[name])
        for name, branch in self._shared_out(offers).items():
            plan.layers[name].low_rank = branch

    def _ranks(self, name: str, plan: QuantPlan, context: PassContext) -> list[int]:
        """The ranks that a layer has room for, ascending."""
        layer: Any = context.denoiser.get_submodule(name)
        outputs, products = len(layer.weight), layer.weight[0].numel()
        wide = targets_of(plan.layers[name], context.targets).weight_bits > self.options.most_bits
        if wide or getattr(layer, "groups", 1) > 1:
            return []
        most = self.options.most * outputs * products / (outputs + products)
        return [rank for rank in sorted(set(self.options.ranks)) if rank <= most]

    def _offers(
        self,
        seen: InputRows,
        held_out: InputRows,
        layer: nn.Module,
        own: LayerTransform | None,
        targets: Targets,
        ranks: Sequence[int],
    ) -> list[Offer]:
        """None, and for each rank the best branch, if it lowers the error enough."""
        plain = held_out_error([layer], seen, held_out, own, targets)
        balance, rotate = (None, None) if own is None else (own.balance, own.rotate)
        found = [Offer(plain, None)]
        whole = [
            low_rank_of(method, layer, seen.values, ranks[-1], targets, balance, rotate)
            for method in self.options.methods
        ]
        for rank in ranks:
            branches = [each.truncated(rank) for each in whole if each is not None]
            if self.options.bits == 8:
                branches = [each.in_8_bits() for each in branches]
            errors = [
                held_out_error([layer], seen, held_out, LayerTransform(balance, rotate, branch), targets)
                for branch in branches
            ]
            best = min(zip(errors, range(len(errors)), strict=True), default=(math.inf, 0))
            if best[0] < (1 - self.options.least_gain) * plain:
                found.append(Offer(best[0], branches[best[1]]))
        return found

    def _shared_out(self, offers: Mapping[str, Sequence[Offer]]) -> dict[str, LowRank | None]:
        """The branches of least summed error within the bytes."""
        if self.options.bytes is None or not offers:
            return {name: options[-1].branch for name, options in offers.items()}
        errors = {name: [offer.error for offer in options] for name, options in offers.items()}
        costs = {name: [float(offer.bytes) for offer in options] for name, options in offers.items()}
        program = ChoiceProgram.of(errors, {"bytes": (costs, float(self.options.bytes))})
        solution: Solution = registry.get("solver", self.options.solver)(program, hint=None)
        assert solution.choice is not None  # none at all is within every budget
        chosen = [int(column - start) for column, start in zip(solution.choice, program.start[:-1], strict=True)]
        return {name: offers[name][place].branch for name, place in zip(program.names, chosen, strict=True)}


def low_rank_of(
    method: LowRankMethod,
    layer: nn.Module,
    inputs: Tensor,
    rank: int,
    targets: Targets,
    balance: Tensor | None = None,
    rotate: Rotate | None = None,
) -> LowRank | None:
    """A low-rank branch of a layer; None where float16 does not hold it.

    Args:
        method: see the top of this file.
        layer: linear, or a convolution without groups.
        inputs: rows of its input, ``[R, C, ...]``.
        rank: r, at most the smaller side of the weight.
        targets: how the weight is quantized.
        balance: what the input is divided by, ``[C]``.
        rotate: what it is rotated by then.
    """
    own: Any = layer.weight
    weight = own.detach().float()
    balanced = LayerTransform(balance)
    if method == "weight":
        wanted, metric = balanced.of_weight(layer, weight), None  # rotations leave singular values as they are
    else:
        transform = LayerTransform(balance, rotate)
        quantized = layer_quantizer(layer, targets.weight_bits, targets, transform=transform)
        fake = transform.weight_restored(layer, quantized.fake_quantize(transformed_weight(layer, transform)))
        wanted, metric = weight - fake.float(), inputs.flatten(1) if method == "weighted-error" else None
    up, down = _truncated(wanted.flatten(1).double(), None if metric is None else metric.double(), rank)
    if method == "weight":
        down = balanced.weight_restored(layer, down.reshape(rank, *weight.shape[1:]).float()).flatten(1).double()
    size = (up.abs().amax(0) / down.abs().amax(1).clamp_min(1e-30)).sqrt()  # alike on both sides: float16 is narrow
    up, down = (up / size).half().cpu(), (down * size[:, None]).half().cpu()
    finite = bool(torch.isfinite(up).all() and torch.isfinite(down).all())
    return LowRank(down, up) if finite else None


def _truncated(matrix: Tensor, rows: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """``up [O, r]`` and ``down [r, K]`` of least ``|(up down - matrix) X^T|``, or without X of least ``|...|``."""
    if rows is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank] * values[:rank], right[:rank]
    moments = rows.T @ rows / len(rows)
    moments.diagonal().add_(DAMPING * moments.diagonal().mean().clamp_min(1e-30))
    root = torch.linalg.cholesky(moments)  # moments = root root^T, so |A X^T|^2 = |A root|^2 R
    left, values, right = torch.linalg.svd(matrix @ root, full_matrices=False)
    down = torch.linalg.solve_triangular(root.T, right[:rank].T, upper=True).T
    return left[:, :rank] * values[:rank], down
