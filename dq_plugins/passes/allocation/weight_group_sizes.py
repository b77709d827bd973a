"""Pass ``weight-group-sizes``: how many inputs share a scale of each layer's weight, under a budget of bytes.

    minimise    sum_l  E[l, g_l]                         E = sum_ok h_k (w_ok - w^_ok)^2 / sum_ok h_k w_ok^2
    subject to  sum_l  bytes of the group scales of l with groups of g_l  <=  bytes

E is the error of the output with the weight alone quantized, over its power, if inputs were uncorrelated; h_k is the
mean square of input k. The groups of a layer are those of ``weight_group_size``, or it has one scale for each output.

Shapes: ``O`` outputs, ``K`` products per output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from dq_plugins import registry
from dq_plugins.errors import RecipeError
from dq_plugins.hooks import hooked
from dq_plugins.observers.streaming import first_argument
from dq_plugins.plan import QuantPlan, Section, WeightQuant
from dq_plugins.quantized.input_rows import has_rows, input_rows, weight_matrix
from dq_plugins.quantized.layer_transform import transform_of, transformed_input, transformed_weight
from dq_plugins.quantized.weight_scale import layer_quantizer
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.solvers.program import ChoiceProgram
from dq_plugins.solvers.solution import Solution


class GroupOffer(NamedTuple):
    """A quantizer that a layer's weight may have, and the error that it leaves of the output over its power."""

    error: float
    quant: WeightQuant

    @property
    def bytes(self) -> int:
        """What its group scales take."""
        scales = self.quant.group_scale
        zeros = (
            self.quant.zero_point if self.quant.zero_point is not None and self.quant.zero_point.dim() == 2 else None
        )
        return 0 if scales is None else scales.nbytes + (0 if zeros is None else zeros.nbytes)


class WeightGroupSizes(Pass):
    """Choose how many inputs share a scale of each layer's weight, by an exact program under a budget of bytes."""

    name = "weight-group-sizes"
    requires = ("weight-ranges",)
    after = ("bit-allocation", "timestep-reduction", "temporal-reconstruction")

    class Options(PassOptions):
        """Options of ``weight-group-sizes``.

        Attributes:
            sizes: what may be, beside one scale for each output.
            bytes: what all group scales may take together. None: what they take as the plan has them, which is those
                of ``weight_group_size`` inputs.
            calls: recorded calls to learn from, spread evenly over the recording.
            rows: rows of a layer's input that count, for each call.
            solver: that shares out the bytes.
        """

        sizes: tuple[Annotated[int, Field(ge=8)], ...] = Field((16, 32, 64, 128), min_length=1)
        bytes: int | None = Field(None, ge=0)
        calls: int = Field(25, ge=1)
        rows: int = Field(24, ge=1)
        solver: str = "cp-sat"

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """See the inputs in one sweep, try the sizes layer by layer, and share out the bytes."""
        now = {n: layer.weight for n, layer in plan.layers.items() if layer.weight is not None}
        names = [n for n, quant in now.items() if quant.rounds and has_rows(context.denoiser.get_submodule(n))]
        names = [n for n in names if n in context.partition.layers and n not in plan.learned_layers]
        spent = sum(GroupOffer(0.0, now[name]).bytes for name in names)
        if self.options.bytes is None and not spent:
            raise RecipeError(
                "weight-group-sizes: no weight has scales in groups, whose bytes could be shared out anew; give "
                "weight_group_size, or the option 'bytes'"
            )
        calls = context.calibration.spread(self.options.calls)
        moments = _Moments({name: context.denoiser.get_submodule(name) for name in names}, self.options.rows)
        for done, call in enumerate(calls.calls()):
            yield Progress(done, len(calls) + len(names), "inputs")
            moments.see(call, context)
        offers = {}
        for done, name in enumerate(names):
            yield Progress(len(calls) + done, len(calls) + len(names), name)
            if name in moments.squares:  # it ran
                offers[name] = self._offers(name, plan, context, moments.squares[name])
        limit = spent if self.options.bytes is None else self.options.bytes
        chosen = self._shared_out(offers, limit)
        for name, quant in chosen.items():
            plan.layers[name].weight = quant
        taken = sum(GroupOffer(0.0, quant).bytes for quant in chosen.values())
        plan.sections[self.name] = Section({"limit": limit, "taken": taken, "layers": len(chosen)})

    def _offers(self, name: str, plan: QuantPlan, context: PassContext, squares: Tensor) -> list[GroupOffer]:
        """One scale for each output, then the sizes that there are, from coarse to fine."""
        layer, planned = context.denoiser.get_submodule(name), plan.layers[name]
        assert planned.weight is not None
        transform, found = transform_of(planned), dict[int, GroupOffer]()
        weight = transformed_weight(layer, transform).float()
        exact = weight_matrix(layer, weight)  # [P, O/P, K]
        power = float((exact.square() * squares).sum())
        for size in (None, *sorted(self.options.sizes, reverse=True)):
            targets = replace(context.targets, weight_group_size=size)
            quant = layer_quantizer(layer, planned.weight.bits, targets, transform=transform)
            count = 1 if quant.group_scale is None else quant.group_scale.shape[1]
            if count not in found:
                fake = weight_matrix(layer, quant.fake_quantize(weight).float())
                error = float(((fake - exact).square() * squares).sum()) / max(power, 1e-300)
                found[count] = GroupOffer(error, quant)
        return list(found.values())

    def _shared_out(self, offers: Mapping[str, Sequence[GroupOffer]], limit: int) -> dict[str, WeightQuant]:
        """The quantizers of least summed error within the bytes."""
        if not offers:
            return {}
        errors = {name: [offer.error for offer in options] for name, options in offers.items()}
        costs = {name: [float(offer.bytes) for offer in options] for name, options in offers.items()}
        program = ChoiceProgram.of(errors, {"bytes": (costs, float(limit))})
        solution: Solution = registry.get("solver", self.options.solver)(program, hint=None)
        assert solution.choice is not None  # one scale for each output is within every budget
        chosen = [int(column - start) for column, start in zip(solution.choice, program.start[:-1], strict=True)]
        return {name: offers[name][place].quant for name, place in zip(program.names, chosen, strict=True)}


class _Moments:
    """Sums of squares of the inputs of layers, ``[P, 1, K]``, over rows drawn from calls."""

    def __init__(self, modules: Mapping[str, nn.Module], count: int) -> None:
        self.modules, self.count = modules, count
        self.squares: dict[str, Tensor] = {}

    def see(self, call: Any, context: PassContext) -> None:
        """Run a call."""
        generator = context.generator("rows", str(call.index))

        def observe(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer, x = self.modules[name], first_argument(name, args, kwargs)
            rows = input_rows(layer, transformed_input(layer, context.transforms.get(name), x), self.count, generator)
            self.squares[name] = self.squares.get(name, torch.zeros(())) + rows.square().sum(1, keepdim=True).cpu()

        with hooked(self.modules, before=observe, first=True):
            call.run(context.denoiser)
