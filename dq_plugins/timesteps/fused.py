"""Modules of PyTorch that, in evaluation mode, hand the weights of their layers to one fused kernel.

The layers are not called then, and whatever quantizes them is skipped without a word.
"""

from __future__ import annotations

from torch import nn


def call_every_layer(model: nn.Module) -> None:
    """Make the transformer encoders of ``model`` call their layers, in place; results change by rounding alone."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # how the layer notes an activation that the fused kernel lacks
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # an input that only the fused kernel takes
