"""What lies before codes by ranges of their own, as part of the operator that makes them (`kernels.dynamic_codes`).

A part of `dq_torchao.kernels.merging`, with the same graphs. From the codes backwards, what only they use:

- SiLU, ``x / (1 + exp(-x))``;
- factors and addends of channels: the affine part of a normalisation, modulation by the timestep, and of group
  normalisation, whose statistics a compiler puts into them, all but the statistics;
- layer normalisation by `dq_torchao.kernels.norm.row_statistics`.

A value is then read from memory once, and only its codes are written.
"""

from __future__ import annotations

import operator
from math import prod
from typing import Any

import torch
from torch import fx

from dq_torchao.kernels.dynamic_codes import PAIRS
from dq_torchao.kernels.nodes import called, value

_ATEN, _OURS = torch.ops.aten, torch.ops.dq_torchao
_PLAIN = 6
"""Arguments of the codes of what nothing is done to."""


def same_codes(graph: fx.Graph, node: fx.Node) -> None:
    """Layers that share an input (query, key, value) share its codes."""
    if node.target is not _OURS.dynamic_codes.default or not node.users:
        return
    for other in list(node.args[0].users):
        if other is not node and other.target is node.target and other.args == node.args:
            other.replace_all_uses_with(node)


def on_the_way(graph: fx.Graph, node: fx.Node) -> None:
    """Take what lies before into the operator."""
    if node.target is not _OURS.dynamic_codes.default or len(node.args) != _PLAIN or node.args[5]:
        return
    x, *quant = node.args[:5]
    spatial = quant[-1]
    if len(x.users) > 1:
        return
    activated, silu = _before_silu(x)
    base, affine = _before_affine(activated, spatial, users=1 + silu)
    rows, eps = (base, None) if spatial else _before_normalisation(base)
    if rows is x or value(rows).dtype != torch.float32 or not _dense(value(rows), spatial):
        return
    with graph.inserting_before(node):
        node.replace_all_uses_with(called(graph, node.target, (rows, *quant, affine, eps, silu), value(node)))


def _dense(x: torch.Tensor, spatial: int) -> bool:
    layout = torch.channels_last if spatial else torch.contiguous_format
    return (not spatial or x.dim() == 4) and x.is_contiguous(memory_format=layout)


def _before_silu(x: fx.Node) -> tuple[fx.Node, bool]:
    if x.target is not _ATEN.div.Tensor or not all(isinstance(each, fx.Node) for each in x.args):
        return x, False
    of, last = x.args
    for target, rest in ((_ATEN.add.Tensor, (1,)), (_ATEN.exp.default, ()), (_ATEN.neg.default, ())):
        if last.target is not target or len(last.users) > 1 or last.args[1:] != rest or last.kwargs:
            return x, False
        last = last.args[0]
    return (of, True) if last is of and len(of.users) == 2 else (x, False)


def _before_affine(x: fx.Node, spatial: int, users: int) -> tuple[fx.Node, list[Any]]:
    """The value that pairs of a factor and an addend are applied to, and these, the first ones first.

    ``users`` is how many ``x`` has when only the codes use it.
    """
    affine: list[Any] = []
    like, inner = value(x), x
    while len(affine) < 2 * PAIRS and len(inner.users) == users:
        of, addend = _other(inner, _ATEN.add.Tensor, like, spatial)
        alone = addend is None or len(of.users) == 1
        of, multiplier = _other(of, _ATEN.mul.Tensor, like, spatial) if alone else (of, None)
        if addend is None and multiplier is None:
            break
        inner, users, affine = of, 1, [multiplier, addend, *affine]
    return inner, affine


def _other(x: fx.Node, target: Any, like: torch.Tensor, spatial: int) -> tuple[fx.Node, fx.Node | None]:
    """What ``x`` is made from by an operation with a tensor of channels, and that."""
    if x.target is not target or x.kwargs or not all(isinstance(each, fx.Node) for each in x.args):
        return x, None
    for of, other in (x.args, x.args[::-1]):
        same = value(of).shape == like.shape and value(of).dtype == torch.float32
        if same and _of_channels(value(other), like, spatial):
            return of, other
    return x, None


def _of_channels(x: torch.Tensor, like: torch.Tensor, spatial: int) -> bool:
    """Whether ``x`` is one row of channels, or one for every entry of the first dimensions of ``like``."""
    shape, axis = (*[1] * (like.dim() - x.dim()), *x.shape), like.dim() - 1 - spatial
    if x.dtype != torch.float32 or shape[axis] != like.shape[axis] or prod(shape[axis + 1 :]) != 1:
        return False
    lead = shape[:axis]
    rows = next((i for i, n in enumerate(lead) if n != like.shape[i]), axis)
    return prod(lead[rows:]) == 1 and x.numel() < like.numel()


def _before_normalisation(x: fx.Node) -> tuple[fx.Node, float | None]:
    if x.target is not _ATEN.mul.Tensor or len(x.users) > 1 or not all(isinstance(each, fx.Node) for each in x.args):
        return x, None
    shifted, inverse = x.args
    if shifted.target is not _ATEN.sub.Tensor or len(shifted.users) > 1 or shifted.kwargs:
        return x, None
    rows, mean = shifted.args
    statistics = [each.args[0] for each in (mean, inverse) if getattr(each, "target", None) is operator.getitem]
    if len(statistics) != 2 or statistics[0] is not statistics[1] or (mean.args[1], inverse.args[1]) != (0, 1):
        return x, None
    made = statistics[0]
    matches = made.target is _OURS.row_statistics.default and made.args[0] is rows
    return (rows, made.args[1]) if matches else (x, None)
