"""Graph surgery: a table gathered by the graph's own timestep, and quantization that inductor lowers to int8.

For oneDNN's int8 linear, inductor takes scale and zero point as tensors, and merges bias, GELU and residual addition
into it (`quantize_by_table`). Its patterns for the int8 convolution match constant scales only. There, activations are
quantized in units of their scale, with the constants 1 and 128, and the scale of the group is multiplied to the
result (`quantize_in_units`):

    y = s * conv(deq(quant(x / s + z)), w) - s z sum(w) + b

A border of zeros would be a border of codes z in these units, so where z is not always 0 the input is padded first.
All columns are gathered at once and selected per layer: one small kernel per call.

Shapes: ``G`` groups, ``L`` observed activations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from dq_plugins.timesteps import TimestepGroups
from dq_torchao.pt2e.shared_calibration import Tables

aten = torch.ops.aten
CONV, LINEAR = aten.conv2d.default, aten.linear.default
WEIGHT_RANGE = (-127, 127)
OFFSET = 128  # stored codes are unsigned
CODES = (0, 255, torch.uint8)  # smallest and largest stored code, dtype
UNIT = (1.0, OFFSET, *CODES)  # scale and zero point in front


class Row(NamedTuple):
    """Nodes of the parameters of the current timestep; of all activations ``[L]``, or of one ``[]``.

    Attributes:
        scale: float32.
        zero_point: of signed codes, float32.
        stored_zero_point: of the codes as they are stored, int32.
    """

    scale: fx.Node
    zero_point: fx.Node
    stored_zero_point: fx.Node


class GroupIndex(torch.nn.Module):
    """Timestep -> group, ``[1]``; a module of its own so that the graph shows one readable node."""

    def __init__(self, groups: TimestepGroups) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, timestep: Tensor) -> Tensor:
        """Group of the first sample: the whole batch has one timestep."""
        return self.groups.index(timestep.reshape(-1)[:1])


def insert_tables(model: fx.GraphModule, recorder: fx.Node, tables: Tables) -> Row:
    """Replace the recorder by gathers from the tables.

    Returns:
        The current parameters of all activations, each ``[L]``.
    """
    graph, timestep = model.graph, recorder.args[0]
    model.add_submodule("_timestep_group", GroupIndex(tables.groups))
    stored = (tables.zero_point + OFFSET).to(torch.int32)
    rows = []
    with graph.inserting_before(recorder):
        index = graph.call_module("_timestep_group", (timestep,))
        for name, table in zip(Row._fields, (tables.scale, tables.zero_point, stored), strict=True):
            model.register_buffer(f"_act_{name}", table)
            gathered = graph.call_function(aten.index_select.default, (graph.get_attr(f"_act_{name}"), 0, index))
            rows.append(graph.call_function(aten.select.int, (gathered, 0, 0)))
    recorder.replace_all_uses_with(timestep)  # type: ignore[arg-type]
    graph.erase_node(recorder)
    return Row(*rows)


def select_column(model: fx.GraphModule, node: fx.Node, row: Row, column: int) -> Row:
    """The parameters of one activation, each ``[]``, selected before ``node``."""
    with model.graph.inserting_before(node):
        return Row(*(model.graph.call_function(aten.select.int, (entry, 0, column)) for entry in row))


def quantize_by_table(model: fx.GraphModule, node: fx.Node, current: Row) -> None:
    """Replace an observer that only linear layers read by quantization with the current scale and zero point."""
    graph, x = model.graph, node.args[0]
    parameters = (current.scale, current.stored_zero_point, *CODES)
    decomposed = torch.ops.quantized_decomposed
    with graph.inserting_before(node):
        codes = graph.call_function(decomposed.quantize_per_tensor.tensor, (x, *parameters))
        values = graph.call_function(decomposed.dequantize_per_tensor.tensor, (codes, *parameters))
    node.replace_all_uses_with(values)
    graph.erase_node(node)


def quantize_in_units(model: fx.GraphModule, node: fx.Node, scale: fx.Node, zero_point: fx.Node | None) -> None:
    """Replace an observer by quantization in units of the scale, and rescale the layers that read it.

    Args:
        model: the graph and its weights.
        node: the observer's call.
        scale: current scale, ``[]``.
        zero_point: current signed zero point, ``[]``; None when it is always 0.
    """
    graph, x = model.graph, node.args[0]
    users = list(node.users)
    padding = None if zero_point is None else take_padding(users)
    with graph.inserting_before(node):
        if padding is not None and any(padding):
            x = graph.call_function(aten.constant_pad_nd.default, (x, padding, 0.0))
        units = graph.call_function(aten.mul.Tensor, (x, graph.call_function(aten.reciprocal.default, (scale,))))
        if zero_point is not None:
            units = graph.call_function(aten.add.Tensor, (units, zero_point))
        codes = graph.call_function(torch.ops.quantized_decomposed.quantize_per_tensor.default, (units, *UNIT))
        values = graph.call_function(torch.ops.quantized_decomposed.dequantize_per_tensor.default, (codes, *UNIT))
    for user in users:
        rescale_output(model, user, scale, zero_point)
    node.replace_all_uses_with(values)
    graph.erase_node(node)


def padding_of(convolution: fx.Node) -> tuple[int, int]:
    """Zeros on each side, ``(vertical, horizontal)``."""
    vertical, horizontal = _argument(convolution, 4, (0, 0))
    return vertical, horizontal


def take_padding(users: list[fx.Node]) -> list[int] | None:
    """Remove the padding of the convolutions among ``users``, and return it as `F.pad` wants it."""
    paddings = {padding_of(user) for user in users if user.target is CONV}
    if not paddings:
        return None
    (height, width) = next(iter(paddings))  # the quantizer shares an observer only among equal paddings
    for user in users:
        if user.target is CONV and len(user.args) > 4:
            user.update_arg(4, [0, 0])
    return [width, width, height, height]


def rescale_output(model: fx.GraphModule, layer: fx.Node, scale: fx.Node, zero_point: fx.Node | None) -> None:
    """Take the bias out of ``layer``, and compute ``s (y - z sum(w)) + b`` after it."""
    graph = model.graph
    bias = _argument(layer, 2, None)
    if bias is not None:
        layer.update_arg(2, None)
    spatial = layer.target is CONV
    readers = list(layer.users)
    with graph.inserting_after(layer):
        result = graph.call_function(aten.mul.Tensor, (layer, scale))
    with graph.inserting_before(result):
        y: Any = layer
        if zero_point is not None:
            # A constant: a second reader of the quantized weight would keep inductor's pattern from matching.
            name = f"_weight_sum_{layer.name}"
            model.register_buffer(name, weight_sum(model, layer.args[1]))  # type: ignore[arg-type]
            sums = per_output(graph, graph.get_attr(name), spatial)
            shift = graph.call_function(aten.mul.Tensor, (sums, zero_point))
            y = graph.call_function(aten.sub.Tensor, (layer, shift))
    result.update_arg(0, y)
    if bias is not None:
        with graph.inserting_after(result):
            total = graph.call_function(aten.add.Tensor, (result, bias))
        with graph.inserting_before(total):
            total.update_arg(1, per_output(graph, bias, spatial))
        result = total
    for reader in readers:
        reader.replace_input_with(layer, result)


def weight_sum(model: fx.GraphModule, node: fx.Node) -> Tensor:
    """Sum of the quantized weights of each output, ``[O]``.

    Args:
        model: the graph's module.
        node: the weight as its layer reads it: behind its observer, or already quantized and dequantized.
    """
    if node.op == "call_module":  # the observer
        observer, weight = model.get_submodule(str(node.target)), _attribute(model, node.args[0])
        scale, zero_point = observer.calculate_qparams()  # type: ignore[operator]
    else:
        quantized = node.args[0]
        weight, scale, zero_point = (_attribute(model, argument) for argument in quantized.args[:3])  # type: ignore[union-attr]
    codes = torch.clamp(torch.round(weight.flatten(1) * (1.0 / scale)[:, None]), *WEIGHT_RANGE)
    assert not zero_point.any()
    return codes.sum(1) * scale


def _attribute(model: fx.GraphModule, node: Any) -> Tensor:
    value: Any = model
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach()


def per_output(graph: fx.Graph, parameter: fx.Node, spatial: bool) -> fx.Node:
    """``[O]``, or ``[O, 1, 1]`` for a convolution."""
    return graph.call_function(aten.reshape.default, (parameter, [-1, 1, 1])) if spatial else parameter


def _argument(node: fx.Node, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else default
