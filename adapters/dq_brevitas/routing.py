"""Tell the timestep quantizers of a model the timestep: one call after quantizing."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from dq_brevitas.corrected import timestep_parts
from dq_brevitas.quantizers import DEFAULT_GROUPS, FINITE_SET_GROUPS
from dq_plugins.errors import TimestepError
from dq_plugins.graph.arguments import find_timestep_argument
from dq_plugins.timesteps import OutOfRange, Schedule, TimestepContext, TimestepGroups, attach_context


def evenly_spaced_groups(count: int, low: float = 0.0, high: float = 1000.0) -> TimestepGroups:
    """Groups of equal width over ``[low, high)``, the range of the usual schedules.

    Timesteps beyond the ends fall into the first and the last group.

    Example:
        >>> evenly_spaced_groups(4).edges
        (250.0, 500.0, 750.0)
    """
    if count < 1:
        raise TimestepError(f"timestep groups are at least 1, got {count}")
    return TimestepGroups(tuple(low + (high - low) * g / count for g in range(1, count)))


def attach_timesteps(
    model: nn.Module,
    groups: int | TimestepGroups | Mapping[str, TimestepGroups],
    *,
    schedule: Schedule | None = None,
    timestep: str | None = None,
    out_of_range: OutOfRange = "error",
) -> nn.Module:
    """Give every timestep quantizer of ``model`` its groups, and route the model by its timestep argument.

    Call it once, on the module whose forward takes the timestep, after quantizing and before calibrating, training or
    loading. Calling it again with other groups resets their tables.

    Args:
        model: the quantized denoiser; changed in place.
        groups: the groups: a number (evenly spaced over 0..1000), `TimestepGroups`, or several sets by name.
        schedule: the sampling schedule; adds the set ``"schedule"`` with one group per timestep, which the finite-set
            quantizers use.
        timestep: name of the forward argument that carries the timestep; found where it is usual.
        out_of_range: what to do with timesteps outside the calibrated range, ``"error"`` or ``"nearest"``.

    Returns:
        ``model``.

    Raises:
        TimestepError: no timestep quantizer in the model, unknown groups, or no timestep argument.
    """
    if isinstance(groups, int):
        groups = evenly_spaced_groups(groups)
    named = {DEFAULT_GROUPS: groups} if isinstance(groups, TimestepGroups) else dict(groups)
    if schedule is not None:
        named.setdefault(FINITE_SET_GROUPS, TimestepGroups.one_per_timestep(schedule.timesteps))
    proxies = timestep_parts(model)
    if not proxies:
        raise TimestepError(
            f"{type(model).__name__} has no timestep quantizer. Quantize it with the quantizers of "
            "dq_brevitas.quantizers, or turn its own into such with dq_brevitas.convert_to_timestep."
        )
    context = TimestepContext(named, out_of_range)
    argument = find_timestep_argument(model, timestep)
    for proxy in proxies.values():
        proxy.bind(context)
    attach_context(model, context, argument)
    return model
