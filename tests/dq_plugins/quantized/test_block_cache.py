from __future__ import annotations

import pytest
import torch
from torch import nn

import dq_plugins as dq
from dq_plugins.errors import CalibrationError
from dq_plugins.quantized.block_cache import BlockRecorder, block_loss
from dq_plugins.quantized.layer import LayerState
from dq_plugins.quantized.reconstruction_units import Unit, find_units
from dq_plugins.quantized.run import QuantizedRun


class Maps(nn.Module):
    """A residual block of 1-d feature maps ``[N, C, L]``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(6, 6, 3, padding=1), nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.relu(self.a(x)))


class Tokens(nn.Module):
    """A residual block of tokens ``[N, L, C]``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.relu(self.a(x)))


class Denoiser(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = (lambda: nn.Conv1d(6, 6, 1)) if isinstance(block, Maps) else (lambda: nn.Linear(6, 6))
        self.first, self.block, self.last = layer(), block, layer()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.last(self.block(self.first(sample * (1 + timestep / 1000))))


@pytest.fixture(params=[Maps, Tokens])
def case(request, tmp_path):
    denoiser = Denoiser(request.param()).eval().requires_grad_(False)

    def sample(d: nn.Module) -> None:
        for t in (900, 300):
            shape = (2, 6, 5) if isinstance(d.block, Maps) else (2, 5, 6)
            d(torch.randn(shape, generator=torch.Generator().manual_seed(t)), torch.tensor(float(t)))

    return denoiser, dq.record(denoiser, sample, tmp_path / "calib", progress=False), tmp_path / "block"


def bias_of(denoiser: Denoiser, layer: nn.Module) -> torch.Tensor:
    return layer.bias[:, None] if isinstance(denoiser.block, Maps) else layer.bias


def test_inputs_are_those_of_the_quantized_denoiser_and_targets_those_of_full_precision(case):
    denoiser, calls, folder = case
    states = {"first": LayerState(torch.zeros_like(denoiser.first.weight))}
    with torch.no_grad(), QuantizedRun(denoiser, ["first"], {}, "timestep") as run:
        unit = Unit("block", (), -1)
        cache = BlockRecorder([unit], calls, folder).record(run, unit, lambda: states)
    assert len(cache) == 2
    recorded = cache.get(1)
    with torch.no_grad():
        call = list(calls.calls())[1]
        hidden = denoiser.first(call.kwargs["sample"] * (1 + call.timestep / 1000))
        flat = bias_of(denoiser, denoiser.first).expand_as(hidden)
        assert torch.equal(recorded.target, denoiser.block(hidden))
        assert torch.equal(recorded.args[0], flat)
    assert float(recorded.timestep) == 300


def test_the_loss_sums_over_the_channels_of_the_layers_and_averages_over_positions(case):
    denoiser, calls, folder = case
    part = dq.partition(denoiser, calls.example_inputs())
    (unit,) = find_units(part, ["block.a", "block.b"])
    states = {"block.b": LayerState(torch.zeros_like(denoiser.block.b.weight))}
    with torch.no_grad(), QuantizedRun(denoiser, unit.layers, {}, "timestep") as run:
        cache = BlockRecorder([unit], calls, folder).record(run, unit, lambda: {})
        found = block_loss(run, cache, 0, states)
        run.use({})
    call = cache.get(0)
    with torch.no_grad():
        y = call.args[0] + bias_of(denoiser, denoiser.block.b)
    channels = 1 if isinstance(denoiser.block, Maps) else 2
    torch.testing.assert_close(found, (y - call.target).square().sum(channels).mean())


def test_a_block_that_does_not_run_is_named(case):
    denoiser, calls, folder = case
    denoiser.idle = nn.Linear(2, 2)
    unit = Unit("idle", (), -1)
    recorder = BlockRecorder([unit], calls, folder)
    with (
        QuantizedRun(denoiser, [], {}, "timestep") as run,
        pytest.raises(CalibrationError, match="block 'idle' did not run in recorded call 0"),
    ):
        recorder.record(run, unit, lambda: {})
