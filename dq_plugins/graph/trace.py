"""Trace a denoiser into its dependency graph."""

from __future__ import annotations

from typing import Any

import networkx as nx
from torch import nn

from dq_plugins.errors import TimestepError, TraceError
from dq_plugins.graph.arguments import argument_names, check_inputs, find_timestep_argument, number_to_tensor
from dq_plugins.graph.export import export_denoiser, program_of
from dq_plugins.graph.lowering import lower
from dq_plugins.graph.real_call import can_be_called, same_ops, trace_real_call

EXPORT = "torch.export"
CALL = "a call that was really made"
DECIDING_CALL = "a call that was really made; with other values the denoiser runs other ops"


def trace(denoiser: nn.Module, example_inputs: dict[str, Any]) -> nx.DiGraph:
    """The dependency graph of one call of a denoiser, as plain data.

    By ``torch.export`` nothing is computed and no weight is copied or moved: the denoiser may be of any size and on any
    device, the meta device included, and is left untouched. Hooks and forwards set on instances are not part of the
    graph. A denoiser that it cannot follow, because its forward asks tensors for values, is called once as it is, if
    weights and inputs have values. The attribute ``tracer`` of the graph says which of the two it was, and whether a
    call with other values runs other ops.

    Every node is one tensor op, in execution order, named as ``torch.export`` names it; inputs are ``"input:NAME"``
    and the last node is ``"output"``. Node attributes (all JSON-serialisable, see
    `networkx.node_link_data`):

    ====================  ================================================================================
    ``op``                the op, ``"aten.conv2d.default"``
    ``kind``              layer kind (``linear``, ``conv2d``, ..., ``embedding``) where its weight comes from
                          parameters; else ``attention``, ``matmul``, ``view``, ``op``, ``input``, ``output``
    ``module``            fully qualified name of the innermost module that runs it
    ``layer``             the module whose weight it uses, for a layer kind; else ``""``
    ``shape``, ``dtype``  of its output; None for ops with several outputs
    ``operand_shapes``    shapes of its tensor operands, in order
                          for a layer, ``input_operand`` and ``weight_operand`` are two positions in it
    ``macs``              multiply-accumulate operations for the batch of the example inputs
    ``parameters``        names of the parameters that it uses, directly or through constant ops
    ``depends``           names of the arguments whose values reach it, sorted; nested ones dotted,
                          ``"added_cond_kwargs.time_ids"``
    ``options``           the op's other arguments: stride, dim, equation, ...
    ====================  ================================================================================

    A size that only the data decides (tokens selected by a mask) counts at its largest. An edge says that a value
    reaches an op; ``positions`` are the operand positions it takes.

    Args:
        denoiser: any module.
        example_inputs: keyword arguments of one call. Tensors give shapes and dtypes only; they may be nested in
            dictionaries, lists and tuples, and may be on the meta device. A timestep that is a number is made a
            tensor, so that it can be followed.

    Returns:
        The graph.

    Raises:
        TraceError: the denoiser cannot be followed; the message says where it stopped, for each way of tracing.
    """
    check_inputs(denoiser, example_inputs)
    inputs = _in_signature_order(denoiser, number_to_tensor(example_inputs, _usual_timestep(denoiser)))
    try:
        graph = lower(program_of(export_denoiser(denoiser, inputs)), denoiser)
        graph.graph["tracer"] = EXPORT
    except TraceError as error:
        if not can_be_called(denoiser, inputs):
            raise
        graph = _by_calling(denoiser, inputs, error)
    return graph


def _by_calling(denoiser: nn.Module, inputs: dict[str, Any], stopped: TraceError) -> nx.DiGraph:
    try:
        program = trace_real_call(denoiser, inputs)
        graph = lower(program, denoiser)
    except Exception as error:  # whatever the model's code raises
        raise stopped from error
    graph.graph["tracer"] = CALL if same_ops(program, denoiser, inputs) else DECIDING_CALL
    return graph


def _usual_timestep(denoiser: nn.Module) -> str | None:
    try:
        return find_timestep_argument(denoiser)
    except TimestepError:
        return None


def _in_signature_order(denoiser: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    # so that the same call always gives the same graph
    order = {name: position for position, name in enumerate(argument_names(denoiser))}
    return dict(sorted(inputs.items(), key=lambda item: order.get(item[0], len(order))))
