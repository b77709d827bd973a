"""Refuse an export whose graph would hold one timestep group for ever."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dq_brevitas.corrected import timestep_parts
from dq_plugins.errors import TimestepError
from dq_plugins.timesteps import route_of

CURE = (
    "Export the denoiser that was given to attach_timesteps, with the timestep as a tensor, or export one graph per "
    "group with dq_brevitas.freeze_timestep_group(model, group)."
)


def check_exportable(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise unless the timestep enters the graph as an input.

    Args:
        model: what is to be exported.
        args: its example inputs.
        kwargs: its example inputs by name.

    Raises:
        TimestepError: the model has timestep quantizers and is not the module that is routed by the timestep, or the
            timestep is a Python number, which exports turn into a constant.
    """
    proxies = timestep_parts(model)
    if not proxies:
        return
    route = route_of(model)
    name = next(iter(proxies))
    if route is None or any(p.timestep_context is not route.context for p in proxies.values()):
        raise TimestepError(
            f"{type(model).__name__} holds timestep quantizers ({name!r}) but is not the denoiser that sees the "
            f"timestep, so its graph would hold the group selected now for ever. {CURE}"
        )
    timestep = route.argument.read(args, kwargs)
    if not isinstance(timestep, Tensor):
        raise TimestepError(
            f"the timestep is {timestep!r}, a {type(timestep).__name__}: an export makes a constant of it, and its "
            f"graph would hold one group for ever. {CURE}"
        )
