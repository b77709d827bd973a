from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transposed import transposed

import dq_plugins as dq
from dq_plugins.affine import affine_parameters, fake_quantize
from dq_plugins.errors import PlanError
from dq_plugins.passes.width_candidates import candidates_of
from dq_plugins.plan import Targets
from dq_plugins.quantized.weight_scale import layer_quantizer, weight_parameters, weight_rows
from dq_plugins.recipe import PassContext


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_transposed_convolutions_have_one_scale(kind: type[nn.Module]) -> None:
    layer = kind(6, 8, 2, groups=2)
    scale, zero_point = weight_parameters(weight_rows(layer), 4, method="minmax")
    assert scale.shape == zero_point.shape == (1,)
    assert scale == layer.weight.abs().max() / 7


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv2d(4, 6, 3), nn.Embedding(6, 4)])
def test_other_layers_have_one_scale_per_entry_of_dimension_0(layer: nn.Module) -> None:
    assert weight_rows(layer) is layer.weight
    assert weight_parameters(weight_rows(layer), 4)[0].shape == (6,)


def test_layers_without_a_weight_are_told() -> None:
    with pytest.raises(PlanError, match="a ReLU has no weight tensor"):
        weight_rows(nn.ReLU())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("method", "steps"), [("shrink", range(80)), ("coarse", range(0, 80, 5))])
def test_scales_are_those_of_least_error_among_the_shrunk_ranges(method, steps, symmetric, monkeypatch) -> None:
    weight = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) ** 3
    low, high = weight.amin(1), weight.amax(1)
    errors, scales = [], []
    for step in steps:
        shrink = 1 - 0.01 * step
        scale, zero = affine_parameters(low * shrink, high * shrink, 4, symmetric=symmetric)
        fake = fake_quantize(weight, scale[:, None], zero[:, None], -8, 7)
        errors.append((fake - weight).double().abs().pow(2.4).mean(1))
        scales.append(scale)
    best = torch.stack(errors).argmin(0)
    monkeypatch.setattr("dq_plugins.quantized.weight_scale.IN_CACHE", 100)  # two rows at a time
    found = weight_parameters(weight, 4, symmetric=symmetric, method=method)[0]
    assert torch.allclose(found, torch.stack(scales)[best, torch.arange(7)])
    assert not torch.allclose(found, scales[0])


def test_the_quantizer_of_some_outputs_is_that_of_all() -> None:
    layer, targets = nn.Linear(32, 12), Targets(4, None)
    whole = layer_quantizer(layer, 4, targets)
    assert torch.equal(layer_quantizer(layer, 4, targets, outputs=slice(None, None, 3)).scale, whole.scale[::3])


def test_every_pass_gives_a_transposed_convolution_one_scale(tmp_path: Path) -> None:
    denoiser, calls = transposed(tmp_path)
    plan = dq.make_plan(denoiser, calls, weight_bits=4, symmetric_weights=False, progress=False)
    quant = plan.layers["up"].weight
    assert quant is not None
    assert quant.scale.shape == quant.zero_point.shape == (1,)
    assert len(plan.layers["down"].weight.scale) == 12
    found = candidates_of(plan, PassContext(denoiser, calls, Targets(4, None)), (1, 2, 8), ())
    assert {bits: each.scale.shape for bits, each in found.weights["up"].items()} == dict.fromkeys((1, 2, 8), (1,))
    assert torch.equal(
        found.weights["up"][1].fake_quantize(denoiser.up.weight).abs().unique(), found.weights["up"][1].scale
    )
