"""Ranges per layer and timestep group from any observer, a third party's included, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dq_plugins.calibration import CalibrationSet
from dq_plugins.observers.base import Observer
from dq_plugins.observers.streaming import stream_inputs
from dq_plugins.timesteps import TimestepGroups


def observe_groups(
    denoiser: nn.Module,
    calibration: CalibrationSet,
    layers: Sequence[str],
    make_observer: Callable[[str], Observer],
    groups: TimestepGroups | None = None,
    *,
    progress: bool = False,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run the recorded calls once, with one observer for each layer and group.

    Args:
        denoiser: the full-precision denoiser.
        calibration: calls recorded from it.
        layers: fully qualified names.
        make_observer: a fresh observer for a layer, for example ``lambda layer: MinMaxObserver(bits=8)``.
        groups: timestep groups; one for each recorded timestep by default.
        progress: show a progress bar.

    Returns:
        By layer, float32 ``low [G]`` and ``high [G]``. A group without recorded timesteps has the range of all.

    Raises:
        CalibrationError: a layer does not exist, did not run at some timestep, or its input is not finite.
    """
    groups = groups or TimestepGroups.one_per_timestep(calibration.timesteps)
    observers: dict[str, dict[int, Observer]] = {layer: {} for layer in layers}
    for group in range(len(groups)):
        timesteps = [t for t in calibration.timesteps if groups.of(t) == group]
        current = {layer: make_observer(layer) for layer in layers}
        receive = _updater(current)
        for _ in stream_inputs(denoiser, calibration, layers, receive, timesteps=timesteps, progress=progress):
            pass
        if timesteps:
            for layer in layers:
                observers[layer][group] = current[layer]
    return {layer: _ranges(found, len(groups), make_observer(layer)) for layer, found in observers.items()}


def _updater(observers: dict[str, Observer]) -> Callable[[str, Tensor], None]:
    return lambda layer, x: observers[layer].update(x)


def _ranges(found: dict[int, Observer], count: int, everything: Observer) -> tuple[Tensor, Tensor]:
    chosen = {group: observer.range() for group, observer in found.items()}
    if len(chosen) < count:
        for observer in found.values():
            everything.merge(observer)
        chosen = {group: chosen.get(group) or everything.range() for group in range(count)}
    low, high = zip(*(chosen[group] for group in range(count)), strict=True)
    return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)
