"""Ranges per layer and timestep group from any observer, a third party's included, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from dq_plugins.calibration import CalibrationSet
from dq_plugins.observers.observer import Observer
from dq_plugins.observers.streaming import Transforms, located, require_reached, stream_inputs
from dq_plugins.timesteps import RowOrder, TimestepGroups


def observe_groups(
    denoiser: nn.Module,
    calibration: CalibrationSet,
    layers: Sequence[str],
    make_observer: Callable[[str], Observer],
    groups: TimestepGroups | None = None,
    rows: Tensor | None = None,
    *,
    transforms: Transforms = MappingProxyType({}),
    orders: Mapping[str, RowOrder | None] = MappingProxyType({}),
    progress: bool = False,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run the recorded calls once, with one observer for each layer and group.

    Args:
        denoiser: the full-precision denoiser.
        calibration: calls recorded from it.
        layers: fully qualified names.
        make_observer: a fresh observer for a layer, for example ``lambda layer: MinMaxObserver(bits=8)``.
        groups: timestep groups; one for each recorded timestep by default.
        rows: which range each group uses, ``[G]``; groups of one number share theirs. None: each has its own.
        transforms: of the inputs of some layers.
        orders: where the samples of a call are in them, for calls whose tokens have several timesteps.
        progress: show a progress bar.

    Returns:
        By layer, float32 ``low [G]`` and ``high [G]``. A group without recorded timesteps has the range of all.

    Raises:
        CalibrationError: a layer does not exist, never ran, or its input is not finite.
        TimestepError: tokens of a call have several timesteps, and it is not known which rows of an input they are.
    """
    groups = groups or TimestepGroups.one_per_timestep(calibration.timesteps)
    rows = torch.arange(len(groups)) if rows is None else rows
    observers: dict[str, dict[int, Observer]] = {layer: {} for layer in layers}
    for row in range(int(rows.max()) + 1):
        timesteps = [t for t in calibration.timesteps if rows[groups.of(t)] == row]
        current = {layer: make_observer(layer) for layer in layers}
        seen: set[str] = set()
        receive = _updater(current, seen)
        for _ in stream_inputs(
            denoiser,
            calibration,
            layers,
            receive,
            timesteps=timesteps,
            transforms=transforms,
            rows=orders,
            progress=progress,
        ):
            pass
        for layer in seen:
            observers[layer][row] = current[layer]
    require_reached(layers, {layer for layer, found in observers.items() if found})
    found = {layer: _ranges(seen, int(rows.max()) + 1, make_observer(layer)) for layer, seen in observers.items()}
    return {layer: (low[rows], high[rows]) for layer, (low, high) in found.items()}


def _updater(observers: dict[str, Observer], seen: set[str]) -> Callable[[str, Tensor, float], None]:
    def receive(layer: str, x: Tensor, timestep: float) -> None:
        seen.add(layer)
        with located(layer, timestep):
            observers[layer].update(x)

    return receive


def _ranges(found: dict[int, Observer], count: int, everything: Observer) -> tuple[Tensor, Tensor]:
    chosen = {group: observer.range() for group, observer in found.items()}
    if len(chosen) < count:
        for observer in found.values():
            everything.merge(observer)
        chosen = {group: chosen.get(group) or everything.range() for group in range(count)}
    low, high = zip(*(chosen[group] for group in range(count)), strict=True)
    return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)
