"""Convolutions over one and three dimensions, and transposed ones, as 2-d convolutions of codes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from dq_torchao import load, save
from dq_torchao.kernels.phases import phase_weight, side_by_side
from dq_torchao.lowering import lower_layer
from dq_torchao.report import execution_report
from torch import Tensor, nn
from torchao_models import GROUPS, TIMESTEPS, layer_plan

import dq_plugins as dq
from dq_plugins.hashing import weights_hash
from dq_plugins.plan import LayerPlan, QuantPlan
from dq_plugins.quantized.layer import simulate_layer
from dq_plugins.timesteps import Schedule, TimestepContext

ONE, PER_SAMPLE = torch.tensor(500.0), torch.tensor([100.0, 800.0])


def planned(layer: nn.Module) -> LayerPlan:
    """A plan with the one scale that the weight of a transposed convolution has."""
    plan = layer_plan(layer)
    assert plan.weight is not None
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        plan.weight.scale = plan.weight.scale.max().reshape(1)
    return plan


def check(layer: nn.Module, x: Tensor, **call: Any) -> None:
    """Integer and simulated execution agree, for one timestep and for one per sample."""
    plan, context = planned(layer), TimestepContext({"all": GROUPS})
    integer, simulated = copy.deepcopy(layer), simulate_layer(copy.deepcopy(layer), plan, context)
    assert lower_layer(integer, plan, context).state == "integer"
    for timestep in (ONE, PER_SAMPLE):
        with context.select(timestep), torch.no_grad():
            y, expected = integer(x, **call), simulated(x, **call)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=3e-4)
            if y.dim() != 4:
                assert y.is_contiguous(), "code that views the result would not run"


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 0, 2), (1, "same", 2), (3, 2, 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_dimension(stride, padding, dilation, groups):
    torch.manual_seed(0)
    check(nn.Conv1d(4, 8, 3, stride, padding, dilation, groups), torch.randn(2, 4, 11) * 4)


@pytest.mark.parametrize("kernel", [1, (3, 1, 1), (1, 3, 3), (2, 3, 1), 3])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [(1, 0, 1), (1, 1, 1), (2, (1, 0, 0), 2), ((2, 1, 1), 1, (2, 1, 1))]
)
def test_three_dimensions(kernel, stride, padding, dilation):
    torch.manual_seed(0)
    for groups in (1, 2):
        layer = nn.Conv3d(4, 8, kernel, stride, padding, dilation, groups)
        check(layer, torch.randn(2, 4, 6, 7, 5) * 4)
        check(layer, (torch.randn(2, 4, 6, 7, 5) * 4).to(memory_format=torch.channels_last_3d))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_borders(mode):
    torch.manual_seed(0)
    check(nn.Conv1d(3, 5, 3, padding=2, padding_mode=mode), torch.randn(2, 3, 9))
    if mode != "reflect":
        check(nn.Conv3d(3, 5, 3, padding=(1, 0, 1), padding_mode=mode), torch.randn(2, 3, 4, 5, 6))


WINDOWS = [
    (kernel, stride, padding, extra, dilation)
    for kernel, stride, padding, dilation in itertools.product((1, 3, 4), (1, 2, 3), (0, 1), (1, 2))
    for extra in (0, 1)
    if extra < max(stride, dilation) and (kernel - 1) * dilation >= padding
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "extra", "dilation"), WINDOWS)
def test_transposed(kernel, stride, padding, extra, dilation):
    torch.manual_seed(0)
    window = (kernel, stride, padding, extra)
    check(nn.ConvTranspose1d(4, 8, *window, groups=2, dilation=dilation), torch.randn(2, 4, 7) * 4)
    sizes = ((kernel, 3), (stride, 2), (padding, 1), (extra, 0))
    check(nn.ConvTranspose2d(4, 6, *sizes, dilation=(dilation, 1)), torch.randn(2, 4, 7, 6) * 4)


def test_transposed_over_three_dimensions():
    torch.manual_seed(0)
    check(nn.ConvTranspose3d(4, 6, 3, 2, 1, 1), torch.randn(2, 4, 3, 5, 4) * 4)
    check(nn.ConvTranspose3d(4, 6, (1, 2, 2), (1, 2, 2), groups=2), torch.randn(2, 4, 3, 5, 4) * 4)


def test_the_size_of_the_result_can_be_asked_for():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 8, 3, 2, 1)
    for size in ((13, 11), (14, 11), (14, 12)):
        check(layer, torch.randn(2, 4, 7, 6) * 4, output_size=size)


def test_phases_are_the_transposed_convolution():
    weight, x = torch.randn(2, 3, 4, 2), torch.randn(1, 2, 5, 6)
    phases = torch.conv2d(x, phase_weight(weight, (2, 2), (1, 1), 1), padding=(1, 0))
    expected = torch.conv_transpose2d(x, weight, stride=2)
    torch.testing.assert_close(side_by_side(phases, (2, 2))[..., : expected.shape[2], :], expected)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv1d(4, 8, 3), (4, 9)), (nn.Conv3d(4, 8, 3), (4, 5, 6, 7)), (nn.ConvTranspose1d(4, 8, 3, 2), (4, 9))],
)
def test_without_a_batch_and_with_an_empty_one(layer, shape):
    plan, context = planned(layer), TimestepContext({"all": GROUPS})
    x, integer = torch.randn(shape), copy.deepcopy(layer)
    lower_layer(integer, plan, context)
    with context.select(ONE), torch.no_grad():
        torch.testing.assert_close(integer(x), integer(x[None])[0])
        assert integer(x[None][:0]).shape == layer(x[None][:0]).shape


class Video(nn.Module):
    """A convolution of every kind, as subclasses that keep their arithmetic; ``sample [B, 4, T, 8, 8]``."""

    class Zeroed(nn.Conv3d):
        def reset_parameters(self) -> None:
            nn.init.normal_(self.weight, std=0.1)
            nn.init.zeros_(self.bias)

        @property
        def outputs(self) -> int:
            return self.out_channels

    def __init__(self) -> None:
        super().__init__()
        self.enter = self.Zeroed(4, 8, 3, padding=1)
        self.frames = nn.Conv1d(8, 8, 3, padding=1)
        self.down = nn.Conv3d(8, 8, (1, 2, 2), stride=(1, 2, 2))
        self.up = nn.ConvTranspose3d(8, 8, (1, 4, 4), (1, 2, 2), (0, 1, 1))
        self.leave = nn.Conv3d(self.enter.outputs, 4, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = torch.relu(self.enter(sample)) * (1 + timestep.reshape(-1, 1, 1, 1, 1) / 1000)
        mixed = self.frames(x.mean((3, 4)))[..., None, None]
        return self.leave(torch.relu(self.up(torch.relu(self.down(x + mixed)))))


def video() -> tuple[Video, QuantPlan]:
    torch.manual_seed(0)
    model = Video().eval().requires_grad_(False)
    layers = {name: planned(layer) for name, layer in model.named_children()}
    plan = QuantPlan("Video", weights_hash(model), "timestep", Schedule(TIMESTEPS), {"all": GROUPS}, layers)
    return model, plan


def test_a_denoiser_of_them_runs_is_saved_and_compiles(tmp_path):
    model, plan = video()
    quantized = dq.apply(copy.deepcopy(model), plan, "torchao")
    simulated = dq.apply(copy.deepcopy(model), plan, "simulate")
    assert {how.state for how in execution_report(quantized).values()} == {"integer"}
    assert isinstance(quantized.enter, Video.Zeroed)
    assert quantized.enter.outputs == 8
    x, timesteps = torch.randn(2, 4, 3, 8, 8), (ONE, torch.tensor(900.0), PER_SAMPLE)
    save(quantized, tmp_path)
    loaded = load(Video(), tmp_path)
    compiled = torch.compile(copy.deepcopy(quantized), fullgraph=True)
    with torch.no_grad():
        for t in timesteps:
            y = quantized(x, t)
            torch.testing.assert_close(y, simulated(x, t), rtol=1e-3, atol=1e-3)
            assert torch.equal(loaded(x, t), y)
            torch.testing.assert_close(compiled(x, t), y, rtol=1e-4, atol=1e-4)
