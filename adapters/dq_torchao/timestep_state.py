"""The timestep groups of a quantized denoiser as part of its state dict.

Layers select their parameters by the edges between timestep groups. Edges are data like scales are: they are saved,
loaded and replaced with the tables that they index. Float64, whatever the denoiser is cast to: a rounded edge would
move a timestep into another group.

Shapes: ``E`` edges between ``E + 1`` groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dq_plugins.quantized.exact_state import ExactState
from dq_plugins.timesteps import TimestepContext, TimestepGroups

NAME = "dq_timestep_groups"
"""Attribute of the denoiser, and so the first part of the entries' names."""


class TimestepState(ExactState):
    """Edges and bounds of every set of groups, as buffers ``<groups>_edges [E]`` and ``<groups>_bounds [2]``.

    Args:
        context: the context of the denoiser; loading a state dict changes its groups.

    Attributes:
        columns: names of the modules that have parameters of each set of groups; see `dq_torchao.columns`.
    """

    dq_quantizer_state = True  # no weights of the denoiser: left out of its hash

    def __init__(self, context: TimestepContext) -> None:
        super().__init__()
        self.context = context
        self.columns: dict[str, list[str]] = {}
        for name, groups in context.groups.items():
            edges, bounds = (torch.tensor(v, dtype=torch.float64) for v in (groups.edges, (groups.low, groups.high)))
            self.register_buffer(f"{_key(name)}_edges", edges)
            self.register_buffer(f"{_key(name)}_bounds", bounds)
        self.exact_state = tuple(name for name, _ in self.named_buffers())

    def bind(self) -> None:
        """Give the context the groups that the buffers hold.

        Raises:
            TimestepError: these are not groups: edges that do not ascend, an empty range.
        """
        for name in self.context.groups:
            edges, bounds = (getattr(self, f"{_key(name)}_{part}").tolist() for part in ("edges", "bounds"))
            self.context.groups[name] = TimestepGroups(tuple(edges), *bounds)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not any(buffer.is_meta for buffer in self.buffers()):
            self.bind()

    def extra_repr(self) -> str:
        """Number of groups of each set."""
        return ", ".join(f"{name}={len(groups)}" for name, groups in self.context.groups.items())


def install_timestep_state(denoiser: nn.Module, context: TimestepContext) -> None:
    """Make the groups of ``context`` part of the state dict of ``denoiser``."""
    if context.groups:
        denoiser.add_module(NAME, TimestepState(context))


def bind_timestep_state(denoiser: nn.Module) -> None:
    """After the buffers of a denoiser were replaced one by one, make its context follow them."""
    state = getattr(denoiser, NAME, None)
    if isinstance(state, TimestepState):
        state.bind()


def _key(name: str) -> str:
    """A name that a buffer may have, which no dot may be part of; different names stay different."""
    return name.replace("_", "__").replace(".", "_d")
