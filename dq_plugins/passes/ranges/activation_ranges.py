"""Pass ``activation-ranges``: the clip range of every layer's input in every timestep group, or its own."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from dq_plugins.affine import MAX_BITS, affine_parameters
from dq_plugins.passes.activations import (
    DEFAULT_GROUPS,
    WIDE,
    Ranges,
    activation_bits,
    from_statistics,
    group_names,
    input_ranges,
    shared_rows,
    statistics,
)
from dq_plugins.passes.ranges.dynamic import dynamic_gains
from dq_plugins.passes.shared_inputs import TRANSFORMING
from dq_plugins.plan import ActivationQuant, DynamicActivationQuant, InputQuant, QuantPlan, Reason, Section
from dq_plugins.quantized.input_rows import has_rows
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.timesteps import TimestepGroups

NO_INPUT = Reason("it reads indices, not activations", "no-input")
WEIGHT_ONLY = Reason("activations stay in floating point, as asked", "weight-only")
NO_WEIGHT = Reason("its weight has no quantizer")


class ActivationRanges(Pass):
    """Choose the range of every layer's input: fixed, by timestep group, by token, or by sample."""

    name = "activation-ranges"
    after = ("calibration-timesteps", "timestep-groups", *TRANSFORMING)

    class Options(PassOptions):
        """Options of ``activation-ranges``.

        Attributes:
            observer: ``"mse"`` (least error among candidate ranges, the same that ``timestep-groups`` compares),
                ``"minmax"``, any other registered observer, or ``"by-width"``: min-max from 8 bits, else mse.
            power: p of the error norm of ``"mse"``.
            ranges: ``"static"``: by timestep group; ``"dynamic"``: linear layers measure the range of each token at run
                time, convolutions that of each sample; ``"measured"``: a layer does where that wins ``dynamic_gain``.
            dynamic_gain: dB less error of a layer's output.
            calls: recorded calls on which the two kinds are compared, spread evenly over the recording.
            samples: of all these calls together. None: 24 where all inputs have 8 bits or more, else 64: with few bits
                the two kinds are closer, and what is decided on few samples makes worse images.
            sample_bits: fewest bits of a convolution's input for which ``"measured"`` tries ranges per sample. Below,
                one far value in a sample costs all others too much: ranges that cut it off make the better images.
        """

        observer: str = "mse"
        power: float = Field(2.0, gt=0)
        ranges: Literal["static", "dynamic", "measured"] = "static"
        dynamic_gain: float = 0.0
        calls: int = Field(24, ge=1)
        samples: int | None = Field(None, ge=1)
        sample_bits: int = Field(6, ge=2, le=MAX_BITS)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Choose the ranges that are not learned; without ``timestep-groups`` before, one holds for all timesteps."""
        o = self.options
        bits = activation_bits(plan, context)
        plan.range_methods = replace(plan.range_methods, inputs=o.observer, power=o.power)
        for name, layer in plan.layers.items():
            if name not in bits and layer.weight is not None:
                layer.unquantized_reason = NO_INPUT if bits else WEIGHT_ONLY
        if not bits:
            return
        low, high = context.calibration.timestep_range
        plan.groups.setdefault(DEFAULT_GROUPS, TimestepGroups((), low, high))
        for name in plan.learned_ranges & bits.keys():
            plan.layers[name].unquantized_reason = None if plan.layers[name].weight is not None else NO_WEIGHT
            del bits[name]
        chosen = yield from self._dynamic(plan, context, bits)
        chosen = {**static_quantizers(plan, context, {n: b for n, b in bits.items() if n not in chosen}), **chosen}
        for done, name in enumerate(bits):
            layer = plan.layers[name]
            layer.activation = chosen[name]
            layer.unquantized_reason = None if layer.weight is not None else NO_WEIGHT
            yield Progress(done + 1, len(bits), name)

    def _dynamic(
        self, plan: QuantPlan, context: PassContext, bits: Mapping[str, int]
    ) -> Generator[Progress, None, dict[str, InputQuant]]:
        """Quantizers with dynamic ranges, of the layers that are to have them."""
        o = self.options
        if o.ranges == "static":
            return {}
        layers = {n: b for n, b in bits.items() if b > 1 and has_rows(context.denoiser.get_submodule(n))}
        if o.ranges == "measured":
            layers = {n: b for n, b in layers.items() if plan.layers[n].kind == "linear" or b >= o.sample_bits}
        if not layers:
            return {}
        if o.ranges == "dynamic":
            return {n: DynamicActivationQuant(width, context.targets.symmetric_acts) for n, width in layers.items()}
        samples = o.samples or (24 if min(layers.values()) >= WIDE else 64)
        judged = replace(context, calibration=context.calibration.spread(o.calls, samples), workdir=None)
        gains = yield from dynamic_gains(judged, static_quantizers(plan, context, layers), plan.groups)
        plan.sections[self.name] = Section({"dynamic_gain": {n: round(gain, 3) for n, (_, gain) in gains.items()}})
        return {n: quant for n, (quant, gain) in gains.items() if gain >= o.dynamic_gain}


def static_quantizers(plan: QuantPlan, context: PassContext, bits: Mapping[str, int]) -> dict[str, ActivationQuant]:
    """Quantizers with ranges by timestep group, chosen on the calls of ``context``, of the layers in ``bits``."""
    names = group_names(plan, bits)
    if bits and from_statistics(plan.range_methods.inputs):
        statistics(context, tuple(sorted(bits)))  # of all layers at once, however many sets of groups there are
    ranges: Ranges = {}
    for groups in dict.fromkeys(names.values()):
        members = {name: width for name, width in bits.items() if names[name] == groups}
        rows = shared_rows(plan, groups)
        ranges |= input_ranges(context, members, plan.groups[groups], plan.range_methods, rows)
    found: dict[str, ActivationQuant] = {}
    for name, width in bits.items():
        scale, zero_point = affine_parameters(*ranges[name], width, symmetric=context.targets.symmetric_acts)
        found[name] = ActivationQuant(width, names[name], scale.cpu(), zero_point.cpu())
    return found
