"""Equal computations of an exported graph merged into one.

Some denoisers compute one thing several times (DiT embeds the timestep again before its last layer). Full precision
does not notice, because inductor merges equal nodes; behind observers of their own the copies would differ. And a
weight with two readers is not lowered to int8 at all: inductor's patterns want one.
"""

from __future__ import annotations

from torch import fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass, get_CSE_banned_ops


def merge_equal(model: fx.GraphModule) -> fx.GraphModule:
    """``model`` with equal nodes merged; as it is when one of its operators writes to its arguments."""
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
