"""Tiny denoisers, and plans with ranges that move with the timestep, for the tests of the torchao adapter."""

from __future__ import annotations

import torch
from plans import all_corrected
from torch import Tensor, nn

from dq_plugins.affine import affine_parameters, integer_range
from dq_plugins.hashing import weights_hash
from dq_plugins.plan import ActivationQuant, LayerPlan, QuantPlan, Reason, WeightQuant
from dq_plugins.timesteps import Schedule, TimestepGroups

GROUPS = TimestepGroups((300.0, 700.0))
TIMESTEPS = (100.0, 500.0, 900.0)


class Denoiser(nn.Module):
    """Two convolutions around two linear layers, with a timestep embedding; ``sample [B, 4, H, W]``."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.time = nn.Linear(1, width)
        self.conv_in = nn.Conv2d(4, width, 3, padding=1)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.conv_out = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.conv_in(sample) + self.time(timestep.reshape(-1, 1).to(sample.dtype) / 1000)[:, :, None, None]
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.down(torch.nn.functional.gelu(self.up(tokens)))
        return self.conv_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


def build(seed: int = 0) -> Denoiser:
    """A frozen denoiser with random weights."""
    torch.manual_seed(seed)
    return Denoiser().eval().requires_grad_(False)


def layer_plan(
    layer: nn.Module, *, act_bits: int = 8, weight_bits: int = 8, symmetric: bool = False, groups: int = 3
) -> LayerPlan:
    """A plan of one layer whose activation range differs much from group to group."""
    weight_scale = layer.weight.detach().float().flatten(1).abs().amax(1) / max(integer_range(weight_bits)[1], 1)
    low, high = torch.linspace(-1.0, -4.0, groups), torch.linspace(2.0, 9.0, groups)
    scale, zero_point = affine_parameters(low, high, act_bits, symmetric=symmetric)
    kind = type(layer).__name__.lower()
    activation = ActivationQuant(act_bits, "all", scale, zero_point)
    weight = WeightQuant(weight_bits, weight_scale)
    return LayerPlan(kind, weight=weight, activation=activation, unquantized_reason=None, rows="first")


def corrected_plan(model: nn.Module, groups: TimestepGroups = GROUPS, **options: bool | int) -> QuantPlan:
    """`denoiser_plan` with `plans.corrected` layers."""
    return all_corrected(denoiser_plan(model, groups, **options), model)


def denoiser_plan(model: nn.Module, groups: TimestepGroups = GROUPS, **options: bool | int) -> QuantPlan:
    """A plan for every layer of ``model``; layer ``time`` stays in full precision."""
    layers = {
        name: layer_plan(module, groups=len(groups), **options)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    if "time" in layers:
        layers["time"] = LayerPlan(
            "linear", frozenset({"temporal"}), unquantized_reason=Reason("the temporal block stays as it is")
        )
    return QuantPlan(
        model=type(model).__name__,
        model_hash=weights_hash(model),
        timestep_argument="timestep",
        schedule=Schedule(TIMESTEPS),
        groups={"all": groups},
        layers=layers,
    )


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise ratio in dB."""
    return float(10 * torch.log10(reference.pow(2).sum() / (reference - other).pow(2).sum().clamp_min(1e-30)))
