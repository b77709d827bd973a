"""What a compiler should merge into operators of ours, or around them: a pass over graphs for inference.

Our operators are opaque to inductor, and what lies between two of them becomes a loop over memory. After its own
passes, when every value is a node with known uses, this one changes

- a product, GELU of it (or of its second half, times the first) and the codes of that: one product, which writes the
  codes of the next layer's input, by given ranges or by ranges of their own;
- a product or an attention, a view of it, and the codes of that: it writes codes, so that queries, keys and values go
  from products to attention, and its result to the next product, as codes;
- the statistics of layer and group normalisation: `dq_torchao.kernels.norm`;
- normalisation, what modulates it, SiLU, and the codes of that: one kernel (`dq_torchao.kernels.before_codes`);
- equal calls: one, so that layers that share an input (query, key, value) share its codes;
- a division by 1.0, as attention blocks have it of a factor that is not used: nothing.

Values stay the same; those of normalisation up to rounding. Graphs without products of ours are left as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from dq_torchao.kernels import attention, before_codes, codes, equals, gelu, graphs, norm  # noqa: F401  # the operators that are looked for
from dq_torchao.kernels.before_codes import codes_of, on_the_way
from dq_torchao.kernels.equals import one_of_equals
from dq_torchao.kernels.graphs import PLAIN
from dq_torchao.kernels.nodes import called, only_user, value
from dq_torchao.kernels.product import GATED_OUTPUTS

_ATEN, _OURS = torch.ops.aten, torch.ops.dq_torchao
_PLAIN = {_OURS.product.default: PLAIN, _OURS.int8_attention.default: attention.PLAIN}
"""What may write codes, and how many arguments it has when nothing follows."""
_PARTS = (attention, before_codes, codes, equals, graphs)
"""Modules that decide what a graph becomes."""
_VIEWS = (
    _ATEN.reshape.default,
    _ATEN.view.default,
    _ATEN.permute.default,
    _ATEN.transpose.int,
    _ATEN.unsqueeze.default,
    _ATEN.squeeze.dim,
)


class Merging(CustomGraphPass):
    """The pass, after one that was there before.

    Args:
        before: that one.
    """

    def __init__(self, before: Callable[[fx.Graph], None] | None = None) -> None:
        self.before = before

    def __call__(self, graph: fx.Graph) -> None:
        """Change ``graph`` in place."""
        if self.before is not None:
            self.before(graph)
        if not any(node.target is _OURS.product.default for node in graph.nodes):
            return
        one_of_equals(graph)
        for change in (_no_division, _statistics, on_the_way, _following, _coded):
            for node in list(graph.nodes):
                change(graph, node)
            graph.eliminate_dead_code()

    def uuid(self) -> Any:
        """What the compiler's caches know it by."""
        before = self.before.uuid() if isinstance(self.before, CustomGraphPass) else None
        return get_hash_for_files((__file__, *(part.__file__ for part in _PARTS))), before


def install() -> None:
    """Have inductor run the pass, after the one it runs already."""
    found = inductor_config.post_grad_custom_post_pass
    if not isinstance(found, Merging) and (found is None or isinstance(found, CustomGraphPass)):
        inductor_config.post_grad_custom_post_pass = Merging(found)


def _no_division(graph: fx.Graph, node: fx.Node) -> None:
    if node.target is _ATEN.div.Tensor and node.args[1] == 1.0 and value(node.args[0]).dtype == value(node).dtype:
        node.replace_all_uses_with(node.args[0])


def _statistics(graph: fx.Graph, node: fx.Node) -> None:
    if node.target is not _ATEN.var_mean.correction or node.kwargs != {"correction": 0, "keepdim": True}:
        return
    measured = _measured(*node.args)
    if measured is None:
        return
    variance, mean = (next((n for n in node.users if n.args[1] == i), None) for i in (0, 1))
    shifted = only_user(variance, _ATEN.add.Tensor)
    inverse = only_user(shifted, _ATEN.rsqrt.default)
    if mean is None or inverse is None or not isinstance(shifted.args[1], float):
        return
    target, *of = measured
    with graph.inserting_after(node):
        both = called(graph, target, (*of, shifted.args[1]), (value(mean), value(inverse)))
    for i, old in ((0, mean), (1, inverse)):
        with graph.inserting_after(both):
            old.replace_all_uses_with(called(graph, operator.getitem, (both, i), value(old)))


def _measured(x: fx.Node, dims: list[int]) -> tuple[Any, ...] | None:
    """The operator that makes the statistics of ``x`` over these dimensions, and its arguments."""
    rows = value(x)
    if rows.dtype != torch.float32 or rows.device.type != "cpu" or not rows.numel():
        return None
    if list(dims) in ([-1], [rows.dim() - 1]):
        return _OURS.row_statistics.default, x
    if list(dims) != [2, 3] or rows.dim() != 4 or x.target not in (_ATEN.reshape.default, _ATEN.view.default):
        return None
    image = value(x.args[0])  # whose channels were split into groups
    if image.dim() != 4 or image.shape[0] != rows.shape[0] or image.shape[1] != rows.shape[1] * rows.shape[2]:
        return None
    return _OURS.group_statistics.default, x.args[0], rows.shape[1]


def _following(graph: fx.Graph, node: fx.Node) -> None:
    if node.target is not _OURS.gelu.default:
        return
    of, activation = node.args
    before, result = of, node
    if of.target is operator.getitem:
        before, result = _gated(node)
        activation = f"gated {activation}"
    if before is None or before.target is not _OURS.product.default or len(before.users) > 1:
        return
    if len(before.args) != PLAIN:
        return
    own = only_user(result, _OURS.dynamic_codes.default)
    if own is not None and own.args[-2:] == (0, []) and not before.args[PLAIN - 4]:
        with graph.inserting_before(own):
            then = *before.args, activation, *own.args[1:5]
            made = called(graph, _OURS.product_dynamic_codes.default, then, value(own), **own.kwargs)
            own.replace_all_uses_with(made)
        return
    coded = codes_of(result)
    last, rest = (result, ()) if coded is None else coded
    with graph.inserting_before(last):
        last.replace_all_uses_with(called(graph, before.target, (*before.args, activation, *rest), value(last)))


def _coded(graph: fx.Graph, node: fx.Node) -> None:
    if _PLAIN.get(node.target) != len(node.args):
        return
    views, last = [], node
    while len(last.users) == 1 and (view := next(iter(last.users))).target in _VIEWS:
        views.append(view)
        last = view
    coded = codes_of(last)
    if coded is None or (views and not _keeps_channels(node, last, coded[1][0])):
        return
    written, rest = coded
    with graph.inserting_before(written):
        after = () if node.target is _OURS.int8_attention.default else ("",)
        made = called(graph, node.target, (*node.args, *after, *rest), value(node).to(torch.uint8))
        for view in views:
            made = called(graph, view.target, (made, *view.args[1:]), value(view).to(torch.uint8))
        written.replace_all_uses_with(made)


def _keeps_channels(node: fx.Node, view: fx.Node, factor: fx.Node) -> bool:
    """Whether the channels of a view are those that an operator writes, where each has a factor of its own."""
    if value(factor).numel() == 1:
        return True
    made, seen = value(node), value(view)
    if node.target is not _OURS.int8_attention.default or seen.dim() != 3:
        return False
    samples, heads, queries, channels = made.shape  # [B, H, L, D'] as [B, L, H D']
    return tuple(seen.shape) == (samples, queries, heads * channels) and seen.is_contiguous()


def _gated(activated: fx.Node) -> tuple[Any, fx.Node]:
    """The product whose first half is multiplied by GELU of its second half, and the result; None where it is not."""
    gate = activated.args[0]
    split = gate.args[0]
    halves = sorted(split.users, key=lambda half: half.args[1])
    result = next(iter(activated.users)) if len(activated.users) == 1 else activated
    if split.target is not _ATEN.split.Tensor or len(halves) != 2 or halves[1] is not gate or len(gate.users) > 1:
        return None, activated
    outputs, last = value(split.args[0]).shape[-1], value(split.args[0]).dim() - 1
    if outputs % GATED_OUTPUTS or tuple(split.args[1:]) not in ((outputs // 2, last), (outputs // 2, -1)):
        return None, activated
    of_both = result.target is _ATEN.mul.Tensor and set(result.args) == {halves[0], activated}
    return (split.args[0], result) if of_both and len(halves[0].users) == 1 else (None, activated)
