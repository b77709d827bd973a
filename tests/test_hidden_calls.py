"""Denoisers of plain PyTorch parts go all the way, and what no quantizer can see is left alone and listed."""

from pathlib import Path

import pytest
import torch
from hidden_calls import Attention, Functional, TwoNames, encoder, recorded_sequence, sequence_denoiser, weight_norm
from torch import nn

import dq_plugins as dq
from dq_plugins.metrics.output_error import output_sqnr

KEPT = {
    Attention: {"middle.inner": "not a layer's weight", "middle.inner.out_proj": "never calls it"},
    Functional: {"middle.inner": "never calls it"},
    TwoNames: {},
    weight_norm: {"middle": "remove_parametrizations"},
    encoder: {
        "middle.layers.0.self_attn": "not a layer's weight",
        "middle.layers.0.self_attn.out_proj": "never calls it",
    },
}


@pytest.mark.parametrize("middle", KEPT, ids=lambda make: make.__name__)
def test_every_backend_runs_the_plan_of(middle, tmp_path: Path) -> None:
    denoiser = sequence_denoiser(middle)
    calibration = recorded_sequence(denoiser, tmp_path)
    plan = dq.make_plan(denoiser, calibration, progress=False)
    kept = {name: layer.why for name, layer in plan.layers.items() if not layer.quantized}
    assert kept.keys() == KEPT[middle].keys()
    for name, words in KEPT[middle].items():
        assert words in kept[name]
    names = {name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    assert names <= plan.layers.keys()
    for backend in ("simulate", "torchao", "brevitas"):
        model = dq.apply(denoiser, plan, backend=backend)
        assert min(output_sqnr(model, calibration).values()) > 30


@pytest.mark.parametrize("backend", ["simulate", "torchao", "brevitas"])
def test_a_fused_encoder_calls_its_quantized_layers(backend: str, tmp_path: Path) -> None:
    denoiser = sequence_denoiser(encoder)
    calibration = recorded_sequence(denoiser, tmp_path)
    plan = dq.make_plan(denoiser, calibration, progress=False)
    model = dq.apply(denoiser, plan, backend=backend)
    called = []
    layer = model.get_submodule("middle.layers.0.linear1")
    inner = layer.forward  # replaced, not hooked: a hook would switch PyTorch's fused kernel off by itself
    object.__setattr__(layer, "forward", lambda *args: (called.append(1), inner(*args))[1])
    if backend == "simulate":
        layer._forward_pre_hooks.clear()
    with torch.no_grad():
        next(iter(calibration.calls())).run(model)
    assert called
