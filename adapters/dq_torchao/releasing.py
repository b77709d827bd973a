"""Memory: free the packed weights that the integer kernels hold in a layout of their own.

After its first call an integer layer on a CPU holds its weight twice: packed, and as int8 codes in the layout of
oneDNN's kernels, which cannot be saved. The packed form can be made again from that layout, so it need not stay. A
released layer runs as before, eager and compiled; its state dict, copies and pickles are those of the layer it was, at
the cost of packing again whenever one is asked for.
"""

from __future__ import annotations

from torch import nn

from dq_torchao.layer import IntegerLayer


def release_weights(model: nn.Module) -> int:
    """Let go of the packed weight of every integer layer whose kernel holds it too.

    Args:
        model: quantized, and called once: a layer that has not run yet, or is not on a CPU, keeps its packed weight.

    Returns:
        Bytes freed.
    """
    return sum(layer.release_weight() for layer in model.modules() if isinstance(layer, IntegerLayer))


def restore_weights(model: nn.Module) -> nn.Module:
    """Hold packed weights again: the way back from `release_weights`."""
    for layer in model.modules():
        if isinstance(layer, IntegerLayer):
            layer.restore_weight()
    return model
