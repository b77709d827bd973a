"""A PT2E quantizer for x86 CPUs whose activation ranges follow the timestep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass, get_CSE_banned_ops
from torchao.quantization.pt2e import PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from dq_plugins.errors import TimestepError
from dq_plugins.graph import TIMESTEP_NAMES
from dq_torchao.pt2e.observer import TimestepGroupObserver
from dq_torchao.pt2e.rewrite import CONV, LINEAR, WEIGHT_RANGE, aten, padding_of
from dq_torchao.pt2e.shared_calibration import SharedCalibration, TimestepRecorder


class TimestepX86Quantizer(Quantizer):
    """int8 linear and convolution layers, one activation range per layer and timestep group.

    Use one quantizer for one model. The batch of one call has one timestep.

    Args:
        groups: largest number of timestep groups; they are chosen at conversion, with the least error.
        timestep: name of the forward argument that carries the timestep; found by itself where it has a usual name.
        power: p of the error norm that ranges minimise.
        symmetric: whether the zero points of convolutions are fixed at 0. Otherwise ranges use their codes better (the
            output of SiLU is hardly ever negative), and convolutions cost a separate padding of their input. Linear
            layers have zero points anyway, at no cost.
        keep: layers to leave in floating point, by fully qualified name.
        min_inputs: layers with fewer input channels stay in floating point; for the first layer int8 does not pay.

    Example::

        exported = torch.export.export(unet, (), inputs).module()
        prepared = prepare_pt2e(exported, TimestepX86Quantizer(groups=8))
        for t in timesteps:
            prepared(**inputs_at(t))
        quantized = torch.compile(convert_pt2e(prepared))  # with torch._inductor.config.freezing = True
    """

    def __init__(
        self,
        groups: int = 8,
        *,
        timestep: str | None = None,
        power: float = 2.0,
        symmetric: bool = True,
        keep: Sequence[str] = (),
        min_inputs: int = 16,
    ) -> None:
        super().__init__()
        self.timestep, self.keep, self.min_inputs = timestep, frozenset(keep), min_inputs
        self.shared = SharedCalibration(groups, power)
        self._activation = {CONV: self._activations(symmetric), LINEAR: self._activations(False)}
        # A small eps: torchao's default, 2**-12, is the scale of a channel of weights up to 0.03, and many are smaller.
        self._weight = QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=2**-30),
            quant_min=WEIGHT_RANGE[0],
            quant_max=WEIGHT_RANGE[1],
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )

    def _activations(self, symmetric: bool) -> QuantizationSpec:
        return QuantizationSpec(
            dtype=torch.uint8,
            observer_or_fake_quant_ctr=TimestepGroupObserver.with_args(shared=self.shared, symmetric=symmetric),
            quant_min=0,
            quant_max=255,
            qscheme=torch.per_tensor_affine,
        )

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        """Merge equal computations; put a recorder behind the timestep argument, before anything that is observed."""
        model = merge_equal(model)
        graph = model.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        timestep = self._find_timestep(placeholders)
        last = placeholders[-1]
        for node in placeholders:
            users = list(node.users)
            with graph.inserting_after(last):
                # An alias keeps observers of an input from running before the recorder.
                alias = graph.call_function(aten.alias.default, (node,))
            alias.meta.update(node.meta)
            for user in users:
                user.replace_input_with(node, alias)
            if node is timestep:
                model.add_submodule("_timestep_recorder", TimestepRecorder(self.shared))
                with graph.inserting_after(last):
                    recorder = graph.call_module("_timestep_recorder", (node,))
                recorder.meta.update(node.meta)
                alias.update_arg(0, recorder)
        # The recorder must be the first to run.
        last.append(recorder)
        model.recompile()
        return model

    def _find_timestep(self, placeholders: list[fx.Node]) -> fx.Node:
        names = [self.timestep] if self.timestep else list(TIMESTEP_NAMES)
        by_name = {str(node.target): node for node in placeholders}
        for name in names:
            if name in by_name:
                return by_name[name]
        raise TimestepError(
            f"the exported graph has no input named {self.timestep or 'like a timestep'!r}; it has: "
            f"{', '.join(by_name)}. Name the one that carries the timestep with timestep='...', and pass it as a "
            "tensor when exporting (a number becomes a constant)."
        )

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Quantize input and weight of every linear and convolution layer with constant weights."""
        readers: dict[tuple[fx.Node, object], fx.Node] = {}
        for node in model.graph.nodes:
            if node.target in (CONV, LINEAR) and self._wanted(node):
                x, weight = node.args[:2]
                # Layers with one input share one observer: the input is then quantized once.
                first = readers.setdefault((x, _border(node)), node)
                activation = self._activation[node.target] if first is node else SharedQuantizationSpec((x, first))
                node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                    input_qspec_map={x: activation, weight: self._weight}, _annotated=True
                )
        return model

    def _wanted(self, node: fx.Node) -> bool:
        weight = node.args[1]
        if weight.op != "get_attr" or weight.meta["val"].shape[1] < self.min_inputs:
            return False
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        return next(reversed(stack.values()))[0] not in self.keep

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing to check."""


def _border(layer: fx.Node) -> tuple[object, ...]:
    """What layers need in common to share a quantized input: the kind of layer, and the padding of a convolution."""
    return (layer.target, *(padding_of(layer) if layer.target is CONV else ()))


def merge_equal(model: fx.GraphModule) -> fx.GraphModule:
    """``model`` with equal nodes merged; as it is when one of its operators writes to its arguments.

    Some denoisers compute one thing several times (DiT embeds the timestep again before its last layer). Full
    precision does not notice, because inductor merges equal nodes; behind observers of their own the copies would
    differ. And a weight with two readers is not lowered to int8 at all: inductor's patterns want one.
    """
    if any(_writes(node) for node in model.graph.nodes):
        return model
    first: dict[object, fx.Node] = {}
    for node in list(model.graph.nodes):
        if node.op == "get_attr" and first.setdefault(node.target, node) is not node:
            node.replace_all_uses_with(first[node.target])
            model.graph.erase_node(node)
    result = CSEPass(get_CSE_banned_ops())(model)
    assert result is not None
    merged = result.graph_module
    merged.meta.update(model.meta)
    merged.graph.set_codegen(model.graph._codegen)  # how the graph takes its inputs apart
    merged.recompile()
    return merged


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
