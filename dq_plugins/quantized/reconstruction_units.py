"""What is reconstructed together: the layers of one block, or a layer that belongs to none.

Source: BRECQ (Li et al. 2021), which reconstructs residual blocks; here they are found from the graph.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from dq_plugins.graph import Partition


@dataclass(frozen=True)
class Unit:
    """One unit of reconstruction.

    Attributes:
        module: fully qualified name of the module whose output is matched.
        layers: layers inside whose rounding is learned, in execution order.
        channel_axis: axis of the channels in that output, from the end.
    """

    module: str
    layers: tuple[str, ...]
    channel_axis: int


def find_units(partition: Partition, layers: Collection[str]) -> list[Unit]:
    """Units that cover ``layers``, in execution order.

    Args:
        partition: the denoiser's partition.
        layers: layers to reconstruct; those of the temporal block are left out by the caller.
    """
    grouped: dict[str, list[str]] = {}
    for name, info in partition.layers.items():
        if name in layers:
            grouped.setdefault(info.block or name, []).append(name)
    return [Unit(module, tuple(names), partition.channel_axes[module]) for module, names in grouped.items()]
