"""The program of one call that was really made, for denoisers that ``torch.export`` cannot follow.

Their forward asks tensors for values: a Python ``if`` on the timestep, lengths read out of a mask. The call is made
with the weights and the example inputs as they are, and every op is noted with what it took. What the code decides on
the way does not show: the program is right for calls that decide the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from dq_plugins.compiled import evaluating, unwrap
from dq_plugins.graph.arguments import map_leaves, named_leaves, tensors_of
from dq_plugins.graph.traced_program import PREFIX, Placeholder, Program, quiet_tracing
from dq_plugins.hooks import hooked


def can_be_called(denoiser: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether weights and inputs have values."""
    tensors = (*denoiser.parameters(), *denoiser.buffers(), *(v for _, v in named_leaves(inputs)))
    return not any(isinstance(value, Tensor) and value.is_meta for value in tensors)


def trace_real_call(denoiser: nn.Module, inputs: Mapping[str, Any]) -> Program:
    """Make one call of a denoiser and note its ops.

    Args:
        denoiser: with real weights; left as it was.
        inputs: keyword arguments of one call, with values.

    Returns:
        The program, as `dq_plugins.graph.export.export_denoiser` gives it.
    """
    denoiser = unwrap(denoiser)
    given = {name: value for name, value in named_leaves(inputs) if isinstance(value, Tensor)}

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(given, tensors, strict=True))
        return tuple(tensors_of(denoiser(**map_leaves(inputs, lambda name, value: named.get(name, value)))))

    with quiet_tracing(), torch.no_grad(), evaluating(denoiser), _modules_noted(denoiser):
        trace = make_fx(call, tracing_mode="real", pre_dispatch=True, _error_on_data_dependent_ops=False)
        module = trace(*given.values())
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
    placeholders = {node: Placeholder("input", name) for node, name in zip(nodes, given, strict=True)}
    names = {id(parameter): name for name, parameter in denoiser.named_parameters()}
    for node in module.graph.nodes:
        if node.op == "get_attr" and (name := names.get(id(getattr(module, str(node.target), None)))):
            placeholders[node] = Placeholder("parameter", name.replace("_orig_mod.", ""))
    return Program(module.graph, module, placeholders, _viewed(module.graph))


def same_ops(program: Program, denoiser: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether a call with other values runs the ops of the program: the numbers halved, in the other order.

    A call with these values may be impossible; then nothing is known against it.
    """

    def changed(_: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype == torch.bool:
            return value
        half = value / 2 if value.is_floating_point() else value // 2
        return half.flip(tuple(range(half.dim())))

    try:
        other = trace_real_call(denoiser, map_leaves(inputs, changed))
    except Exception:  # whatever the model's code raises
        return True
    one, two = ([str(n.target) for n in p.graph.nodes if n.op == "call_function"] for p in (program, other))
    return one == two


@contextlib.contextmanager
def _modules_noted(denoiser: nn.Module) -> Iterator[None]:
    """Note on every op the innermost module that runs it, as ``torch.export`` does."""
    modules = dict(denoiser.named_modules())
    entered: list[fx.Node] = []  # the last node before each module that runs

    def last() -> fx.Node:
        mode: Any = get_proxy_mode()
        return next(iter(reversed(mode.tracer.graph.nodes)))

    def enter(*_: Any) -> None:
        entered.append(last())

    def leave(name: str, *_: Any) -> None:
        path = f"{PREFIX}.{name}" if name else PREFIX
        start, node = entered.pop(), last()
        while node is not start:  # modules inside have noted theirs already
            node.meta.setdefault("nn_module_stack", {"": (path, type(modules[name]))})
            node = node.prev

    with hooked(modules, before=enter, after=leave):
        yield


def _viewed(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    # what the trace keeps of the tensors does not say which of them share memory; the ops do
    viewed: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        aliased = [result.alias_info.before_set for result in schema.returns if result.alias_info is not None]
        for argument, value in zip(schema.arguments, node.args, strict=False):
            shares = argument.alias_info is not None and argument.alias_info.before_set in aliased
            if shares and isinstance(value, fx.Node):
                viewed[node] = viewed.get(value, value)
    return viewed
