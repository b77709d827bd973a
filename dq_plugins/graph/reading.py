"""What one node of an exported program says: its module, its shape, the region of code that it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from dq_plugins.errors import TraceError
from dq_plugins.graph import ops
from dq_plugins.graph.traced_program import without_prefix
from dq_plugins.layer_kinds import BY_OPERATOR

_LARGEST_SIZE = 2**48  # a larger bound is not a bound: it is the largest integer that torch can express

# Higher-order ops that run one region of code once, with the operands that stand last among their arguments.
_RUN_ONCE = frozenset([
    "wrap", "wrap_with_autocast", "wrap_with_set_grad_enabled", "wrap_activation_checkpoint",
    "tag_activation_checkpoint", "invoke_subgraph",
])  # fmt: skip


def inlined_region(node: fx.Node, owner: nn.Module) -> fx.GraphModule | None:
    """The region of code that a higher-order op runs once, to be lowered in its place.

    Args:
        node: a call.
        owner: the graph module that the call belongs to.

    Returns:
        The region; None for ordinary ops, and for higher-order ops whose regions only compute with their operands
        (the score function of a flexible attention), which count as one op.

    Raises:
        TraceError: the op chooses or repeats regions, and there are layers in them.
    """
    found = [getattr(owner, str(n.target), None) for n in ops.tensor_operands(node) if n.op == "get_attr"]
    regions = [region for region in found if isinstance(region, fx.GraphModule)]
    if len(regions) == 1 and ops.base_name(node.target) in _RUN_ONCE:
        return regions[0]
    for region in regions:
        for inner in region.graph.nodes:
            if inner.op == "call_function" and ops.base_name(inner.target) in BY_OPERATOR:
                raise TraceError(
                    f"module {module_of(node) or 'the denoiser itself'!r} runs layers inside of "
                    f"{ops.base_name(node.target)!r}, where whether and how often they run is decided by tensor "
                    "values. Choose the branch with a Python argument instead."
                )
    return None


def module_of(node: fx.Node) -> str:
    """Fully qualified name of the innermost module whose code the op belongs to."""
    stack = node.meta.get("nn_module_stack")
    path = list(stack.values())[-1][0] if stack else ""
    return without_prefix(path) if path else ""  # "" is the wrapper around the denoiser, which only packs arguments


def shape_of(value: Any) -> list[int] | None:
    """Shape of a traced tensor; None for anything else."""
    return [_size(size) for size in value.shape] if isinstance(value, Tensor) else None


def _size(size: int | torch.SymInt) -> int:
    """A size as a number; one that only the data decides (selecting by a mask) counts at its largest."""
    if isinstance(size, int):
        return size
    largest = size.node.shape_env.bound_sympy(size.node.expr).upper
    if not largest.is_Integer or largest > _LARGEST_SIZE:
        raise TraceError(
            f"a tensor of the denoiser has a size that depends on tensor values without a bound ({size}), so its cost "
            "cannot be known. Compute sizes from shapes, or pass them as Python arguments."
        )
    return int(largest)
