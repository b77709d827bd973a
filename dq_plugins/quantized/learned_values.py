"""What is learned of planned layers, as what they compute with and as what the plan says of them.

A key is the name of a layer and what of it is learned:

    "rounding"      codes of its weight; the value is the weight, transformed
    "scales"        scales of its weight, the codes stay as they are, ``[O]``
    "ranges"        scale and zero point of its input, ``[2, G]``; of dynamic ranges, the share of the extremes, ``[]``
    "corrections"   what is added to its output, ``[G, O]``
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from dq_plugins.affine import MAX_BITS, per_row
from dq_plugins.artifact import STRICT, StoredTensor
from dq_plugins.layer_kinds import kind_of
from dq_plugins.plan import (
    ActivationQuant,
    BiasCorrection,
    DynamicActivationQuant,
    InputQuant,
    LayerPlan,
    QuantPlan,
    WeightQuant,
)
from dq_plugins.quantized.input_quantizers import ActivationQuantizer, DynamicQuantizer
from dq_plugins.quantized.layer import LayerState
from dq_plugins.quantized.layer_transform import restored_weight, transform_of, transformed_weight
from dq_plugins.quantized.learner import Learned
from dq_plugins.quantized.output_correction import OutputCorrection
from dq_plugins.quantized.rounding_variables import RoundingMethod
from dq_plugins.quantized.run import QuantizedRun, States
from dq_plugins.quantized.variables import Correction, InputClip, InputRange, Smooth, Variables, WeightScale

What = Literal["rounding", "scales", "ranges", "corrections"]
Key = tuple[str, What]
Values = Mapping[Key, Tensor]


class PlannedVariables:
    """Variables of some layers of a plan.

    Args:
        run: of the denoiser; in full precision while this is made.
        plan: the plan so far.
        layers: whose variables.
        learn: what is learned of them, where the plan has it. Scales are of weights whose rounding is not learned;
            the rounding of `QuantPlan.learned_layers` is settled.
        method: of rounding.
        rate: learning rate of everything else, as a multiple of the method's.
        most_bits: ranges of wider inputs are not learned.

    Attributes:
        variables: by key.
    """

    def __init__(
        self,
        run: QuantizedRun,
        plan: QuantPlan,
        layers: Iterable[str],
        learn: Collection[What],
        method: RoundingMethod,
        *,
        rate: float = 1.0,
        most_bits: int = MAX_BITS,
    ) -> None:
        self.run, self.plan, self.rate, self.most_bits = run, plan, rate, most_bits
        self.variables: dict[Key, Variables] = {}
        self._codes: dict[str, Tensor] = {}  # of weights whose scales are learned
        for name in layers:
            self._add(name, plan.layers[name], learn, method)

    def _add(self, name: str, layer: LayerPlan, learn: Collection[What], method: RoundingMethod) -> None:
        module, device = self.run.modules[name], self.run.full_weight(name).device
        found, quant, kind = self.variables, layer.weight, kind_of(module)
        if quant is not None and quant.rounds and kind is not None and not kind.lookup:
            if "rounding" in learn and name not in self.plan.learned_layers:
                found[name, "rounding"] = method.variables(transformed_weight(module, transform_of(layer)), quant)
            elif "scales" in learn:
                self._codes[name] = quant.quantize(transformed_weight(module, transform_of(layer)))
                found[name, "scales"] = WeightScale(quant, device, self.rate)
        if "ranges" in learn and layer.activation is not None and layer.activation.bits <= self.most_bits:
            found[name, "ranges"] = _range(layer.activation, device, self.rate)
        if "corrections" in learn and layer.quantized and kind is not None and not kind.lookup:
            correction = layer.bias_correction or _no_correction(module, layer)
            unit = self._unit(name, layer, len(correction.values))
            found[name, "corrections"] = Correction(correction.values.to(device), unit, self.rate)

    def _unit(self, name: str, layer: LayerPlan, rows: int) -> Tensor:
        """About what rounding the input moves an output by, ``[G, O]`` (or ``[1, O]``)."""
        module, kind = self.run.modules[name], kind_of(self.run.modules[name])
        assert kind is not None
        weight = transformed_weight(module, transform_of(layer)).detach().movedim(kind.output_axis, 0)
        norm = weight.flatten(1).norm(dim=1)
        norm = norm.repeat(_outputs(module) // len(norm))[None]  # [1, O]
        if layer.activation is None:
            return norm
        if isinstance(layer.activation, DynamicActivationQuant):
            return norm * 2.0 ** (1 - layer.activation.bits)  # of tokens of about 1
        scale = layer.activation.scale.to(norm)
        return norm * (scale[:, None] if len(scale) == rows else scale.mean())

    def states(self, states: States, values: Values) -> dict[str, LayerState]:
        """``states`` with values in place of what they had; differentiable in them."""
        found = dict(states)
        for (name, what), value in values.items():
            found[name] = self._with(name, what, value, found[name])
        return found

    def _with(self, name: str, what: What, value: Tensor, state: LayerState) -> LayerState:
        module, layer = self.run.modules[name], self.plan.layers[name]
        if what == "rounding":
            return state._replace(weight=restored_weight(module, value, transform_of(layer)))
        if what == "scales":
            weight = scaled(self._codes[name], value, layer.weight)
            return state._replace(weight=restored_weight(module, weight, transform_of(layer)))
        if what == "ranges":
            if isinstance(state.quantizer, DynamicQuantizer):
                state.quantizer.clip = value
            elif isinstance(state.quantizer, ActivationQuantizer):
                state.quantizer.scale, state.quantizer.zero_point = value.unbind()
            return state
        if state.correction is None:
            kind = kind_of(module)
            assert kind is not None
            table = _no_correction(module, layer)
            state = state._replace(correction=OutputCorrection(table, self.run.context, kind, value.device, layer.rows))
        assert isinstance(state.correction, OutputCorrection)
        state.correction.values = value
        return state


def _range(quant: InputQuant, device: torch.device, rate: float) -> Smooth:
    return (
        InputClip(quant, device, rate) if isinstance(quant, DynamicActivationQuant) else InputRange(quant, device, rate)
    )


@dataclass(frozen=True)
class LearnedUnit:
    """What was learned of a block, or of the denoiser.

    Attributes:
        losses: before and after, and whether what there was is kept.
        values: by layer, and by what of it.
    """

    __pydantic_config__ = STRICT

    losses: dict[str, float | bool]
    values: dict[str, dict[What, StoredTensor]]

    @classmethod
    def of(cls, learned: Learned[Key]) -> LearnedUnit:
        """What a learner found that decided everything together."""
        verdict, values = learned.verdict, dict[str, dict[What, Tensor]]()
        for (name, what), value in learned.decided.items():
            values.setdefault(name, {})[what] = value
        losses = {"start": verdict.start_loss, "learned": verdict.learned_loss, "kept_start": verdict.kept_start}
        return cls(losses, values)

    def write(self, plan: QuantPlan, denoiser: nn.Module) -> None:
        """Put it into the plan."""
        for name, own in self.values.items():
            layer = plan.layers[name]
            for what, value in own.items():
                _write(layer, denoiser.get_submodule(name), what, value.cpu())


def _write(layer: LayerPlan, module: nn.Module, what: What, value: Tensor) -> None:
    if what in ("rounding", "scales"):
        assert layer.weight is not None
        rounding = what == "rounding"
        codes = value if rounding else layer.weight.quantize(transformed_weight(module, transform_of(layer))).cpu()
        layer.weight = replace(layer.weight, codes=codes, scale=layer.weight.scale if rounding else value)
    elif what == "ranges":
        if isinstance(layer.activation, DynamicActivationQuant):
            clips = tuple(min(float(clip), 1.0) for clip in value)
            groups = layer.activation.groups is not None
            layer.activation = replace(layer.activation, **({"group_clips": clips} if groups else {"clip": clips[0]}))
        elif layer.activation is not None:
            layer.activation = replace(layer.activation, scale=value[0].clone(), zero_point=value[1].int())
    else:
        layer.bias_correction = replace(layer.bias_correction or _no_correction(module, layer), values=value)


def _no_correction(module: nn.Module, layer: LayerPlan) -> BiasCorrection:
    table = layer.activation if isinstance(layer.activation, ActivationQuant) else None
    groups, rows = (None, 1) if table is None else (table.groups, len(table.scale))
    return BiasCorrection(torch.zeros(rows, _outputs(module)), groups)


def scaled(codes: Tensor, scale: Tensor, quant: WeightQuant | None) -> Tensor:
    """The weight that codes stand for at another scale ``[O]`` (or ``[1]``); differentiable in it."""
    if quant is None:
        return codes.float() * per_row(scale, codes)
    return quant.stretched(codes.float() - quant.zeros(codes), codes) * per_row(scale, codes)


def _outputs(module: nn.Module) -> int:
    kind = kind_of(module)
    assert kind is not None
    weight = module._parameters["weight"]
    assert weight is not None
    return kind.outputs(weight.shape, getattr(module, "groups", 1))
