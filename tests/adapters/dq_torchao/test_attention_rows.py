"""Frames folded into the batch before attention, in either order: operands have the ranges of their samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dq_plugins as dq
from dq_plugins.errors import TimestepError
from dq_plugins.recipe import Recipe, Step

TIMESTEPS, FRAMES, PLACES, CHANNELS = (900.0, 500.0, 100.0), 3, 5, 8
RECIPE = Recipe(
    "attention alone", "", (Step("timestep-groups", {"method": "uniform", "groups": 3}), Step("attention-ranges"))
)


class Frames(nn.Module):
    """``sample [B, FRAMES, PLACES, C]``; each frame attends to itself, louder with time."""

    def __init__(self, frames_outside: bool) -> None:
        super().__init__()
        self.frames_outside = frames_outside
        self.enter = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        loud = 1 + timestep.reshape(-1, 1, 1, 1) / 100
        x = self.enter(sample) * loud
        x = x.transpose(0, 1) if self.frames_outside else x
        folded = x.flatten(0, 1).unflatten(-1, (2, -1)).transpose(1, 2)  # [N, heads, PLACES, C / heads]
        y = F.scaled_dot_product_attention(folded / 20, folded, folded).transpose(1, 2).flatten(2)
        y = y.unflatten(0, x.shape[:2])
        return (y.transpose(0, 1) if self.frames_outside else y) / loud


def denoiser(frames_outside: bool) -> Frames:
    torch.manual_seed(0)
    return Frames(frames_outside).eval().requires_grad_(False)


def noise(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, FRAMES, PLACES, CHANNELS, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    found = {}
    for outside in (False, True):

        def sample(model: nn.Module) -> None:
            for t in TIMESTEPS:
                model(noise(2), torch.tensor([t]))

        calibration = dq.record(denoiser(outside), sample, tmp_path_factory.mktemp("calib"), progress=False)
        found[outside] = dq.make_plan(denoiser(outside), calibration, RECIPE, progress=False)
    return found


@torch.no_grad()
def together_and_alone(outside: bool, plan: dq.QuantPlan, backend: str) -> tuple[Tensor, Tensor]:
    model, x, t = dq.apply(denoiser(outside), plan, backend=backend), noise(3, seed=1), torch.tensor(TIMESTEPS)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    return model(x, t), alone


@pytest.mark.parametrize("backend", ["simulate", "torchao"])
@pytest.mark.parametrize("outside", [False, True])
def test_every_frame_has_the_range_of_its_sample(plans, outside, backend) -> None:
    assert plans[outside].attention[""].rows == ("fastest" if outside else "first")
    torch.testing.assert_close(*together_and_alone(outside, plans[outside], backend), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["simulate", "torchao"])
def test_another_order_would_show_and_none_is_an_error(plans, backend) -> None:
    plan = plans[True]
    try:
        plan.attention[""].rows = "first"
        together, alone = together_and_alone(True, plan, backend)
        assert float((together - alone).abs().max()) > 0.01
        plan.attention[""].rows = None
        with pytest.raises(TimestepError, match="which rows"):
            together_and_alone(True, plan, backend)
    finally:
        plan.attention[""].rows = "fastest"


def test_the_order_is_in_the_saved_plan(plans, tmp_path) -> None:
    assert dq.QuantPlan.load(plans[True].save(tmp_path)).attention[""].rows == "fastest"
