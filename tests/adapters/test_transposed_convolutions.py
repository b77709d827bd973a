"""Every backend executes a plan of a denoiser with a transposed convolution, and computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dq_torchao import execution_report, load, save
from torch import Tensor, nn
from transposed import TIMESTEPS, Transposed, transposed

import dq_plugins as dq


def outputs(model: nn.Module) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.stack([model(x, torch.tensor(t)) for t in TIMESTEPS])


@pytest.mark.parametrize("act_bits", [8, None])
@pytest.mark.parametrize("recipe", ["default", "tfmq"])
def test_backends_agree(tmp_path: Path, recipe: str, act_bits: int | None) -> None:
    denoiser, calls = transposed(tmp_path)
    options = {"block-reconstruction": {"iterations": 20}} if recipe == "tfmq" else {}
    plan = dq.make_plan(denoiser, calls, recipe, weight_bits=4, act_bits=act_bits, options=options, progress=False)
    reference = outputs(dq.apply(denoiser, plan, "simulate"))
    assert not torch.allclose(reference, outputs(denoiser), atol=1e-3)
    for backend in ("torchao", "brevitas"):
        torch.testing.assert_close(outputs(dq.apply(denoiser, plan, backend)), reference, rtol=1e-4, atol=1e-4)


def test_the_weight_is_packed_and_saved(tmp_path: Path) -> None:
    denoiser, calls = transposed(tmp_path / "calib")
    plan = dq.make_plan(denoiser, calls, weight_bits=4, act_bits=None, progress=False)
    quantized = dq.apply(denoiser, plan, "torchao")
    report = execution_report(quantized)["up"]
    assert (report.state, report.bytes) == ("weight-only", denoiser.up.weight.numel() // 2)
    assert report.reason
    save(quantized, tmp_path / "saved")
    assert torch.equal(outputs(load(Transposed(), tmp_path / "saved")), outputs(quantized))
