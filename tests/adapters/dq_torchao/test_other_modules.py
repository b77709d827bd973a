"""Denoisers with modules beside plain layers, and calls of layers in other ways."""

from __future__ import annotations

import dq_torchao
import pytest
import torch
from torch import Tensor, nn

import dq_plugins as dq

TIMESTEPS = (900.0, 500.0, 100.0)


class Beside(nn.Module):
    """Layers beside a module that multiplies raw parameters, or is called by keyword."""

    def __init__(self, beside: nn.Module) -> None:
        super().__init__()
        self.time, self.inner = nn.Linear(1, 16), nn.Linear(4, 16)
        self.beside = beside
        self.outer = nn.Linear(16, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = self.inner(input=sample) + self.time(timestep.reshape(-1, 1, 1).float() / 1000)
        if isinstance(self.beside, nn.MultiheadAttention):
            return self.outer(input=h + self.beside(h, h, h, need_weights=False)[0])
        return self.outer(input=h + self.beside(h))


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


BESIDE = {
    "attention of torch": lambda: nn.MultiheadAttention(16, 2, batch_first=True),
    "encoder layer of torch": lambda: nn.TransformerEncoderLayer(16, 2, 16, batch_first=True),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
    "raw parameter": Raw,
    "gain called weight": lambda: nn.LayerNorm(16),
}


def build(name: str) -> Beside:
    torch.manual_seed(0)
    return Beside(BESIDE[name]()).eval().requires_grad_(False)


def sample(model: nn.Module) -> list[Tensor]:
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
    return [model(sample=x, timestep=torch.full((2,), t)) for t in TIMESTEPS]


@pytest.mark.parametrize("name", BESIDE)
def test_what_saves_loads(name, tmp_path):
    model = build(name)
    plan = dq.make_plan(model, dq.record(model, sample, tmp_path / "c", progress=False), "fast", progress=False)
    simulated = sample(dq.apply(model, plan, backend="simulate"))
    quantized = dq.apply(model, plan, backend="torchao")
    outputs = sample(quantized)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(outputs, simulated, strict=True))
    assert dq_torchao.execution_report(quantized)["inner"].state == "integer"
    dq_torchao.save(quantized, tmp_path / "saved")
    loaded = dq_torchao.load(build(name), tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(sample(loaded), outputs, strict=True))
