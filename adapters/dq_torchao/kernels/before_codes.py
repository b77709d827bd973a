"""What lies before codes of an input, as part of the operator that makes them (`kernels.dynamic_codes`).

A part of `dq_torchao.kernels.merging`, with the same graphs. From the codes backwards, what only they use:

- SiLU, ``x / (1 + exp(-x))``;
- factors and addends of channels: the affine part of a normalisation, modulation by the timestep;
- layer and group normalisation by the statistics of `dq_torchao.kernels.norm`.

A value is then read from memory once, and only its codes are written.
"""

from __future__ import annotations

import operator
from math import prod
from typing import Any

import torch
from torch import fx

from dq_plugins.affine import integer_range
from dq_torchao.kernels.dynamic_codes import FEWEST, PAIRS
from dq_torchao.kernels.nodes import called, only_user, value

_ATEN, _OURS = torch.ops.aten, torch.ops.dq_torchao
_TO_DTYPE = torch.ops.prims.convert_element_type.default
_TO_CODES = (_ATEN.mul.Tensor, _ATEN.round.default, _ATEN.add.Tensor, _ATEN.clamp_min.default, _ATEN.clamp_max.default)
_PLAIN = 7
"""Arguments of the codes of what nothing is done to."""


def on_the_way(graph: fx.Graph, node: fx.Node) -> None:
    """Take what lies before codes, by ranges of their own or by given ones, into the operator that makes them."""
    if node.target is _OURS.dynamic_codes.default:
        if len(node.args) == _PLAIN and not node.args[6]:
            x, *quant = node.args[:6]
            _take(graph, x, node, node.target, tuple(quant))
    elif node.target in (_ATEN.add.Tensor, _ATEN.mul.Tensor, _ATEN.div.Tensor) and (coded := codes_of(node)):
        last, quant = coded
        if value(node).numel() >= FEWEST and value(node).device.type == "cpu":
            spatial = 2 if value(node).dim() == 4 else 0
            _take(graph, node, last, _OURS.activation_codes_after.default, (*quant, spatial))


def _take(graph: fx.Graph, x: fx.Node, codes: fx.Node, target: Any, quant: tuple[Any, ...]) -> None:
    """Let ``target`` make the ``codes`` of ``x`` of what lies before; ``quant``: its other arguments."""
    spatial = quant[-1]
    if len(x.users) > 1:
        return
    activated, silu = _before_silu(x)
    base, affine = _before_affine(activated, spatial, users=1 + silu)
    rows, eps = (base, None) if spatial else _before_normalisation(base)
    groups = 0
    if spatial and affine:
        affine[:2], eps, groups = _group_normalisation(base, affine[:2])
    if rows is x or value(rows).dtype != torch.float32 or not _dense(value(rows), spatial):
        return
    with graph.inserting_before(codes):
        args, kwargs = (rows, *quant, affine, eps, silu, groups), codes.kwargs if codes.target is target else {}
        codes.replace_all_uses_with(called(graph, target, args, value(codes), **kwargs))


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
    made = _statistics(mean, inverse, _OURS.row_statistics.default, rows)
    return (x, None) if made is None else (rows, made.args[1])


def _statistics(mean: Any, inverse: Any, target: Any, of: fx.Node) -> fx.Node | None:
    """The call of ``target`` for ``of`` that gives this mean and this inverse deviation."""
    made = [each.args[0] for each in (mean, inverse) if getattr(each, "target", None) is operator.getitem]
    if len(made) != 2 or made[0] is not made[1] or (mean.args[1], inverse.args[1]) != (0, 1):
        return None
    return made[0] if made[0].target is target and made[0].args[0] is of else None


def _group_normalisation(x: fx.Node, affine: list[Any]) -> tuple[list[Any], float | None, int]:
    """Weight and bias, eps and groups, where the factor and the addend of channels are those of a group normalisation.

    A compiler makes of it, with mean m and inverse deviation r: factor ``r w``, addend ``-m (r w) + b``.
    """
    as_it_is = affine, None, 0
    samples, channels = value(x).shape[:2]
    factor, addend = (_stripped(each, samples, channels) for each in affine)
    if (
        factor is None
        or addend is None
        or factor.target is not _ATEN.mul.Tensor
        or addend.target is not _ATEN.add.Tensor
    ):
        return as_it_is
    (inverse, weight), (shift, bias) = factor.args, addend.args
    if getattr(shift, "target", None) is not _ATEN.mul.Tensor or shift.args[1] is not factor:
        return as_it_is
    mean = shift.args[0].args[0] if shift.args[0].target is _ATEN.neg.default else None
    made = _statistics(mean, inverse, _OURS.group_statistics.default, x)
    by_channel = all(isinstance(each, fx.Node) and value(each).numel() == channels for each in (weight, bias))
    if made is None or not by_channel:
        return as_it_is
    return [weight, bias], made.args[2], made.args[1]


def _stripped(x: fx.Node | None, samples: int, channels: int) -> fx.Node | None:
    """What is looked at as ``[N, C, 1, 1]``."""
    while x is not None and x.target is _ATEN.unsqueeze.default:
        x = x.args[0]
    if (
        x is None
        or x.target is not _ATEN.as_strided.default
        or list(x.args[1:]) != [[samples, channels], [channels, 1]]
    ):
        return None
    groups = value(x.args[0])
    return x.args[0] if groups.is_contiguous() and groups.numel() == samples * channels else None


def codes_of(node: fx.Node) -> tuple[fx.Node, tuple[Any, ...]] | None:
    """Where ``node`` becomes codes and nothing else: the node that has them, factor, zero point and width."""
    steps: list[fx.Node] = []
    last: fx.Node | None = node
    for target in (*_TO_CODES, _TO_DTYPE):
        last = only_user(last, target)
        if last is None:
            return None
        steps.append(last)
    scaled, _, shifted, low, high, _ = steps
    factor, zero = (next(x for x in each.args if x is not of) for each, of in ((scaled, node), (shifted, steps[1])))
    for bits in range(1, 9):
        if (low.args[1], high.args[1]) == tuple(bound + 128 for bound in integer_range(bits)):
            break
    else:
        return None
    if last.args[1] != torch.uint8 or not isinstance(factor, fx.Node) or not isinstance(zero, fx.Node):
        return None
    one_zero = value(zero).numel() == 1 and value(zero).dtype == torch.int32
    per_output = value(factor).dim() == 1 and value(factor).shape[0] == value(node).shape[-1]
    takes = value(factor).numel() == 1 or (per_output and value(node).dim() != 4)
    return (last, (factor, zero, bits)) if one_zero and takes and value(factor).dtype == torch.float32 else None
