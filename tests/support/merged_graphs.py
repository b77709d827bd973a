"""Graphs with products of ours, as a compiler sees them, and what the pass that merges makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dq_torchao.kernels import merging
from dq_torchao.kernels.product import LINEAR
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

OURS = torch.ops.dq_torchao


def layer(outputs: int, inputs: int) -> tuple[Tensor, ...]:
    weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    scale, zero = torch.tensor([2e-3]), torch.tensor([120], dtype=torch.int32)
    return (
        scale,
        zero,
        weight.view(torch.uint8).flatten() ^ 128,  # packed
        torch.rand(outputs) * 0.01,
        torch.randn(outputs),
    )


def multiply(codes: Tensor, layer: tuple[Tensor, ...]) -> Tensor:
    scale, zero, weight, weight_scale, bias = layer
    shape = [len(bias), codes.shape[-1]]
    return OURS.product(codes, scale, zero, weight, shape, 8, False, None, None, weight_scale, bias, *LINEAR)


def in_loops(x: Tensor, layer: tuple[Tensor, ...], bits: int = 8) -> Tensor:
    """As a compiler sees it."""
    low, high = 128 - 2 ** (bits - 1), 127 + 2 ** (bits - 1)
    return ((x.float() * layer[0].reciprocal()).round() + layer[1]).clamp(low, high).to(torch.uint8)


def merged(function: Callable[..., Any], *arguments: Any) -> fx.GraphModule:
    graph = make_fx(torch.func.functionalize(function), select_decomp_table(), "fake")(*arguments)
    merging.Merging()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def targets(graph: fx.GraphModule) -> list[object]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]
