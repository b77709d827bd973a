"""A plan for any small denoiser, made by hand: what an adapter is tested with, without any pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.affine import affine_parameters
from dq_plugins.hashing import weights_hash
from dq_plugins.hooks import hooked
from dq_plugins.layer_kinds import kind_name
from dq_plugins.plan import ActivationQuant, LayerPlan, QuantPlan, WeightQuant
from dq_plugins.testing.denoiser import TIMESTEPS, example_inputs
from dq_plugins.timesteps import Schedule, TimestepGroups


def handmade_plan(
    denoiser: nn.Module,
    *,
    bits: int = 8,
    groups: TimestepGroups | None = None,
    inputs: Mapping[str, Any] | None = None,
    timesteps: Sequence[float] = TIMESTEPS,
) -> QuantPlan:
    """Min-max ranges, symmetric, one per output channel and one per timestep group.

    Args:
        denoiser: the denoiser; its linear and convolution layers are quantized.
        bits: width of weights and activations.
        groups: timestep groups; one per timestep by default.
        inputs: arguments of one call, with a ``timestep``; those of `TinyDenoiser` by default.
        timesteps: the schedule.

    Returns:
        A valid plan of ``denoiser``.
    """
    groups = TimestepGroups.one_per_timestep(timesteps) if groups is None else groups
    peaks = _peaks(denoiser, groups, example_inputs() if inputs is None else inputs, timesteps)
    layers = {}
    for name, peak in peaks.items():
        weight = denoiser.get_submodule(name).weight.detach().abs().flatten(1).amax(1)
        layers[name] = LayerPlan(
            kind=kind_name(denoiser.get_submodule(name)),
            weight=WeightQuant(bits, affine_parameters(-weight, weight, bits, symmetric=True)[0]),
            activation=ActivationQuant(bits, "all", *affine_parameters(-peak, peak, bits, symmetric=True)),
            unquantized_reason=None,
        )
    return QuantPlan(
        model=type(denoiser).__name__,
        model_hash=weights_hash(denoiser),
        timestep_argument="timestep",
        schedule=Schedule(tuple(timesteps)),
        groups={"all": groups},
        layers=layers,
        recipe="handmade",
    ).validate()


@torch.no_grad()
def _peaks(
    denoiser: nn.Module, groups: TimestepGroups, inputs: Mapping[str, Any], timesteps: Sequence[float]
) -> dict[str, Tensor]:
    """Largest absolute input of every layer in every group, ``[G]``."""
    layers = {name: module for name, module in denoiser.named_modules() if kind_name(module) in ("linear", "conv2d")}
    peaks = {name: torch.zeros(len(groups)) for name in layers}
    group = 0

    def watch(name: str, args: tuple[Any, ...], _: dict[str, Any]) -> None:
        peaks[name][group] = torch.maximum(peaks[name][group], args[0].abs().amax())

    with hooked(layers, before=watch):
        for t in timesteps:
            group = groups.of(t)
            denoiser(**{**inputs, "timestep": torch.tensor(t)})
    return peaks
