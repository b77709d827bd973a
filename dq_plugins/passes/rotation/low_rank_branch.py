"""Pass ``low-rank``: a branch of small rank, in floating point or in 8 bits, that takes what few bits cannot.

    f(x, w)  ~  f(Q(x'), Q(w'))  +  f(x, l)              w' of w - l,  l = up down

The branch multiplies the input as it comes, so the error of the quantized input meets the rest of the weight only.

Which l is best is measured, layer by layer, among

    "weight"            the largest singular vectors of the weight after balancing   (Li et al. 2024, SVDQuant)
    "error"             those of the weight's quantization error                      (Guo et al. 2023, LQ-LoRA)
    "weighted-error"    the same, whitened by the second moments of the input: least error of the output
                        (Zhang et al. 2024, QERA)
    "principal"         what the principal directions of the input meet; then the rest of the input alone is quantized,
                        whose range is narrower (Saxena et al. 2024, ResQ; `dq_plugins.quantized.split`)

Shapes: ``C`` input channels, ``O`` outputs, ``K`` products per output, ``r`` rank, ``R`` rows of the input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from dq_plugins import registry
from dq_plugins.passes.image_errors import errors_by_layer
from dq_plugins.passes.rotation.held_out_error import InputRows, held_out_error
from dq_plugins.passes.rotation.sampled_inputs import SampledInputs
from dq_plugins.passes.shared_inputs import layers_by_input, targets_of
from dq_plugins.plan import LowRank, QuantPlan, Subspace, Targets
from dq_plugins.quantized.layer_transform import LayerTransform, transformed_weight
from dq_plugins.quantized.rotate import Rotate
from dq_plugins.quantized.split import Split
from dq_plugins.quantized.weight_scale import layer_quantizer
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.solvers.program import ChoiceProgram
from dq_plugins.solvers.solution import Solution

LowRankMethod = Literal["weight", "error", "weighted-error", "principal"]
Branch = LowRank | Subspace
DAMPING = 1e-2
"""Of the second moments, as a share of their mean diagonal."""


class Offer(NamedTuple):
    """A branch that a layer may have, or none, and the error that it leaves of the layer's output over its power."""

    error: float
    branch: Branch | None
    bytes: int = 0


class LowRankBranch(Pass):
    """Add a low-rank branch of 16 or 8 bits to weights, where it lowers the error of the layer's output."""

    name = "low-rank"
    after = ("calibration-timesteps", "channel-balance", "rotation")

    class Options(PassOptions):
        """Options of ``low-rank``.

        Attributes:
            ranks: what r may be; a layer has the largest that it has room for, or what it gets of ``bytes``.
            bytes: what all branches may take together; the ranks of least summed error are found exactly. That is the
                error that layers make in the final image, where the recording holds whole sampling runs, else in
                their own outputs. None: there is no limit.
            share: the same, as a share of the bytes of the codes of all weights.
            bits: of both matrices: 16, in floating point, or 8, codes with a scale for each direction; principal
                directions have 16.
            methods: what is tried beside none.
            most: largest share of a layer's weights that the branch may have; layers where r is more have none.
            most_bits: wider weights have none.
            calls: recorded calls to learn from, spread evenly over the recording.
            rows: rows of a layer's input that count, for each call.
            groups: timestep groups with ranges of their own, by which branches are compared.
            least_gain: share of its error that a layer must lose, or it stays as it is.
            solver: that shares out the bytes.
        """

        ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field((4, 8, 16), min_length=1)
        bytes: int | None = Field(None, ge=0)
        share: float | None = Field(None, gt=0)
        bits: Literal[8, 16] = 16
        methods: tuple[LowRankMethod, ...] = Field(("weight", "weighted-error", "principal"), min_length=1)
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
        first = {name: names[0] for names in layers_by_input(context, everywhere=True) for name in names}
        ranks = {name: self._ranks(name, plan, context) for name in first}
        names = [name for name, fitting in ranks.items() if fitting]
        # layers that share an input share its directions, so that it is split once
        first = {name: next(other for other in names if first[other] == first[name]) for name in names}
        limit = self._limit(plan, context)
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
            targets = targets_of(name, plan, context)
            room = ranks[name] if limit is not None else ranks[name][-1:]
            shared = sampled.rows_of(first[name], 1)[0].values
            offers[name] = self._offers(*rows, layer, transform, targets, room, shared)
        whole = (yield from errors_by_layer(plan, context, names)) if limit is not None else None
        for name, branch in self._shared_out(offers, limit, whole).items():
            layer = plan.layers[name]
            layer.low_rank = branch if isinstance(branch, LowRank) else None
            if isinstance(branch, Subspace):  # of all rows, now that it need not be judged
                rows = torch.cat([part.values for part in sampled.rows_of(first[name], 1)])
                layer.subspace = subspace_of(rows, branch.rank)

    def _limit(self, plan: QuantPlan, context: PassContext) -> float | None:
        """Bytes that all branches may take together."""
        limits = [] if self.options.bytes is None else [float(self.options.bytes)]
        if self.options.share is not None:
            layers: dict[str, Any] = {name: context.denoiser.get_submodule(name) for name in context.partition.layers}
            bits = {name: targets_of(name, plan, context).weight_bits for name in layers}
            limits.append(self.options.share * sum(bits[n] * m.weight.numel() for n, m in layers.items()) / 8)
        return min(limits, default=None)

    def _ranks(self, name: str, plan: QuantPlan, context: PassContext) -> list[int]:
        """The ranks that a layer has room for, ascending."""
        layer: Any = context.denoiser.get_submodule(name)
        outputs, products = len(layer.weight), layer.weight[0].numel()
        wide = targets_of(name, plan, context).weight_bits > self.options.most_bits
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
        shared: Tensor,
    ) -> list[Offer]:
        """None, and for each rank the best branch, if it lowers the error enough; ``shared`` gives the directions."""
        plain = held_out_error([layer], seen, held_out, own, targets)
        balance, rotate = (None, None) if own is None else (own.balance, own.rotate)
        found = [Offer(plain, None)]
        whole: list[Branch | None] = [
            subspace_of(shared, ranks[-1])
            if method == "principal"
            else low_rank_of(method, layer, seen.values, ranks[-1], targets, balance, rotate)
            for method in self.options.methods
        ]
        for rank in ranks:
            offers = []
            for each in whole:
                if each is None:
                    continue
                branch = each.truncated(rank)
                if isinstance(branch, LowRank) and self.options.bits == 8:
                    branch = branch.in_8_bits()
                error = held_out_error([layer], seen, held_out, _beside(branch, balance, rotate), targets)
                offers.append(Offer(error, branch, _bytes(branch, layer)))
            best = min(offers, key=lambda offer: offer.error, default=found[0])
            if best.error < (1 - self.options.least_gain) * plain:
                found.append(best)
        return found

    def _shared_out(
        self, offers: Mapping[str, Sequence[Offer]], limit: float | None, whole: Mapping[str, float] | None = None
    ) -> dict[str, Branch | None]:
        """The branches of least summed error within the bytes.

        ``whole``: error of the final image that each layer makes without a branch; None: of outputs over their power.
        """
        if limit is None or not offers:
            return {name: options[-1].branch for name, options in offers.items()}
        weight = {n: 1.0 if whole is None else whole[n] / max(each[0].error, 1e-30) for n, each in offers.items()}
        errors = {name: [weight[name] * offer.error for offer in options] for name, options in offers.items()}
        costs = {name: [float(offer.bytes) for offer in options] for name, options in offers.items()}
        program = ChoiceProgram.of(errors, {"bytes": (costs, limit)})
        solution: Solution = registry.get("solver", self.options.solver)(program, hint=None)
        assert solution.choice is not None  # none at all is within every budget
        chosen = [int(column - start) for column, start in zip(solution.choice, program.start[:-1], strict=True)]
        return {name: offers[name][place].branch for name, place in zip(program.names, chosen, strict=True)}


def _beside(branch: Branch, balance: Tensor | None, rotate: Rotate | None) -> LayerTransform:
    if isinstance(branch, Subspace):
        return LayerTransform(balance, rotate, split=Split(branch))
    return LayerTransform(balance, rotate, branch)


def _bytes(branch: Branch, layer: Any) -> int:
    return branch.nbytes(layer.weight) if isinstance(branch, Subspace) else branch.nbytes


def subspace_of(inputs: Tensor, rank: int) -> Subspace | None:
    """The principal directions of an input; None where it has no more channels than that.

    Args:
        inputs: rows, ``[R, C, ...]``; second moments are of the values at all positions, without their mean taken
            away, in float64.
        rank: r.
    """
    values = inputs.double().movedim(1, -1).reshape(-1, inputs.shape[1])  # [.., C]
    if rank >= values.shape[1]:
        return None
    directions = torch.linalg.eigh(values.T @ values).eigenvectors  # ascending
    return Subspace(directions[:, -rank:].flip(1).T.half().contiguous().cpu())


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
        method: see the top of this file; not ``"principal"``.
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
