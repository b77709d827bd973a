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

Shapes: ``r`` rank, ``R`` rows of the input, ``C`` its channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dq_plugins.passes.image_errors import errors_by_layer
from dq_plugins.passes.rotation.branch_program import Limits, Offer, bytes_of, shared_out, time_of
from dq_plugins.passes.rotation.branches import Branch, LowRankMethod, beside, low_rank_of, subspace_of
from dq_plugins.passes.rotation.held_out_error import InputRows, fake_inputs, held_out_error
from dq_plugins.passes.rotation.sampled_inputs import SampledInputs
from dq_plugins.passes.shared_inputs import layers_by_input, targets_of
from dq_plugins.plan import LowRank, QuantPlan, Subspace
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress


class LowRankBranch(Pass):
    """Add a low-rank branch of 16 or 8 bits to weights, where it lowers the error of the layer's output."""

    name = "low-rank"
    after = ("calibration-timesteps", "channel-balance", "rotation")

    class Options(PassOptions):
        """Options of ``low-rank``.

        Attributes:
            ranks: what r may be; a layer has the largest that it has room for, or what limits and a price leave it.
            bytes: what all branches may take together; the ranks of least summed error are found exactly. That is the
                error that layers make in the final image, where the recording holds whole sampling runs, else in
                their own outputs. None: there is no limit.
            share: the same, as a share of the bytes of the codes of all weights.
            time: what all branches may take of time, over that of all layers in full precision, roughly:
                `dq_plugins.passes.rotation.branch_program`.
            price: share of the error that is left, counted as under ``bytes``, that the same share of time must take
                away.
            wide_price: the same in runs whose weights are to have more than ``most_bits``; None: these have no branch.
            bits: of both matrices: 16, in floating point, or 8, codes with a scale for each direction; principal
                directions have 16.
            methods: what is tried beside none.
            most: largest share of a layer's weights that the branch may have; layers where r is more have none.
            most_bits: wider weights have none, but for ``wide_price``.
            calls: recorded calls to learn from, spread evenly over the recording.
            rows: rows of a layer's input that count, for each call.
            groups: timestep groups with ranges of their own, by which branches are compared.
            least_gain: share of its error that a layer must lose, or it stays as it is.
            solver: that shares out bytes and time.
        """

        ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field((4, 8, 16), min_length=1)
        bytes: int | None = Field(None, ge=0)
        share: float | None = Field(None, gt=0)
        time: float | None = Field(None, ge=0)
        price: float = Field(0.0, ge=0)
        wide_price: float | None = Field(None, ge=0)
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
        limits = Limits(self._bytes(plan, context), self.options.time)
        price = (self.options.wide_price or 0.0) if self._wide(plan) else self.options.price
        shared = limits != Limits() or price > 0
        calls = context.calibration.spread(self.options.calls)
        sampled = SampledInputs(context.denoiser, names, self.options.rows)
        for done, call in enumerate(calls.calls() if names else ()):
            yield Progress(done, len(calls) + len(names), "inputs")
            sampled.see(call, context.generator("rows", str(call.index)))
        offers = {}
        for done, name in enumerate(names):
            yield Progress(len(calls) + done, len(calls) + len(names), name)
            room = ranks[name] if shared else ranks[name][-1:]
            directions = sampled.rows_of(first[name], 1)[0].values
            offers[name] = self._offers(
                name, plan, context, room, sampled.rows_of(name, self.options.groups), directions
            )
        image = (yield from errors_by_layer(plan, context, names)) if shared else None
        macs = sum(info.macs for info in context.partition.layers.values())
        chosen = shared_out(offers, limits, self.options.solver, image=image, price=price, macs=macs)
        for name, branch in chosen.items():
            layer = plan.layers[name]
            layer.low_rank = branch if isinstance(branch, LowRank) else None
            if isinstance(branch, Subspace):  # of all rows, now that it need not be judged
                rows = torch.cat([part.values for part in sampled.rows_of(first[name], 1)])
                layer.subspace = subspace_of(rows, branch.rank)

    def _bytes(self, plan: QuantPlan, context: PassContext) -> float | None:
        """What all branches may take together."""
        limits = [] if self.options.bytes is None else [float(self.options.bytes)]
        if self.options.share is not None:
            layers: dict[str, Any] = {name: context.denoiser.get_submodule(name) for name in context.partition.layers}
            bits = {name: targets_of(name, plan, context).weight_bits for name in layers}
            limits.append(self.options.share * sum(bits[n] * m.weight.numel() for n, m in layers.items()) / 8)
        return min(limits, default=None)

    def _wide(self, plan: QuantPlan) -> bool:
        """Whether the run aims at wide weights, and these may have branches."""
        return self.options.wide_price is not None and plan.targets.weight_bits > self.options.most_bits

    def _ranks(self, name: str, plan: QuantPlan, context: PassContext) -> list[int]:
        """The ranks that a layer has room for, ascending."""
        layer: Any = context.denoiser.get_submodule(name)
        outputs, products = len(layer.weight), layer.weight[0].numel()
        wide = targets_of(name, plan, context).weight_bits > self.options.most_bits
        if (wide and not self._wide(plan)) or getattr(layer, "groups", 1) > 1:
            return []
        most = self.options.most * outputs * products / (outputs + products)
        return [rank for rank in sorted(set(self.options.ranks)) if rank <= most]

    def _offers(
        self,
        name: str,
        plan: QuantPlan,
        context: PassContext,
        ranks: Sequence[int],
        rows: tuple[InputRows, InputRows],
        directions: Tensor,
    ) -> list[Offer]:
        """No branch, and for each rank that of the best method where it lowers the error enough.

        ``rows``: of the layer's input, seen and held out; ``directions``: rows of the input that principal ones are of.
        """
        layer, own = context.denoiser.get_submodule(name), context.transforms.get(name)
        info, targets = context.partition.layers[name], targets_of(name, plan, context)
        balance, rotate = (None, None) if own is None else (own.balance, own.rotate)
        inputs = fake_inputs(layer, *rows, own, targets)
        plain = held_out_error([layer], *rows, own, targets, inputs)

        def offer(branch: Branch) -> Offer:
            if isinstance(branch, LowRank) and self.options.bits == 8:
                branch = branch.in_8_bits()
            # a branch of the weight leaves the input as it is
            quantized = inputs if isinstance(branch, LowRank) else None
            error = held_out_error([layer], *rows, beside(branch, balance, rotate), targets, quantized)
            return Offer(error, branch, bytes_of(branch, layer.weight), time_of(branch, info))

        whole: list[Branch | None] = [
            subspace_of(directions, ranks[-1])
            if method == "principal"
            else low_rank_of(method, layer, rows[0].values, ranks[-1], targets, balance, rotate)
            for method in self.options.methods
        ]
        branches = [branch for branch in whole if branch is not None]
        best = [min(map(offer, (b.truncated(r) for b in branches)), key=lambda o: o.error) for r in ranks if branches]
        return [Offer(plain, None), *(each for each in best if each.error < (1 - self.options.least_gain) * plain)]
