"""What a module that replaces a layer must keep, so that code that reads the layer's attributes goes on working."""

from __future__ import annotations

from torch import nn

SIZES = ("in_features", "out_features", "in_channels", "out_channels")


def keep_sizes(stand_in: nn.Module, layer: nn.Module) -> nn.Module:
    """Give a stand-in the sizes of the layer that it replaces (those of ``nn.Linear`` and the convolutions).

    Args:
        stand_in: gets the attributes, in place.
        layer: the replaced layer.

    Returns:
        The stand-in.
    """
    for name in SIZES:
        if hasattr(layer, name):
            setattr(stand_in, name, getattr(layer, name))
    return stand_in
