"""LoRA adapters (peft) beside quantized layers: unmerged they work; merging, and training through integers, do not."""

from __future__ import annotations

import copy

import dq_torchao
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torchao_models import denoiser_plan

from dq_plugins.errors import DQError
from dq_plugins.plan import Reason

peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_v", "conv1"]


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, cross_attention_dim=8, attention_head_dim=4,
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def quantized(weight_only: bool = False) -> UNet2DConditionModel:
    model = unet()
    plan = denoiser_plan(model, weight_bits=4 if weight_only else 8)
    if weight_only:
        for layer in plan.layers.values():
            layer.activation, layer.unquantized_reason = None, Reason("weight only")
    return dq_torchao.apply(model, plan)


def with_adapter(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    return model


def run(model: nn.Module, t: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    x, states = torch.randn(2, 3, 8, 8, generator=g), torch.randn(2, 4, 8, generator=g)
    return model(x, torch.tensor(t), encoder_hidden_states=states).sample


@pytest.mark.parametrize("weight_only", [False, True])
@torch.no_grad()
def test_an_adapter_does_on_the_quantized_base_what_it_does_on_the_full_one(weight_only):
    model, base, full = with_adapter(quantized(weight_only)), quantized(weight_only), with_adapter(unet())
    for t in (100.0, 900.0):
        effect = run(model, t) - run(base, t)
        expected = run(full, t) - run(unet(), t)
        assert float(nn.functional.cosine_similarity(effect.flatten(), expected.flatten(), dim=0)) > 0.8
    model.disable_adapters()
    assert torch.equal(run(model, 500.0), run(base, 500.0))


@torch.no_grad()
def test_an_adapter_is_saved_and_loaded_on_a_quantized_base(tmp_path):
    model = with_adapter(quantized())
    model.save_lora_adapter(tmp_path)
    again = quantized()
    again.load_lora_adapter(str(tmp_path), prefix=None, use_safetensors=True)
    assert torch.equal(run(again, 500.0), run(model, 500.0))


@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_fusing_is_refused_because_it_would_be_lost(weight_only, safe):
    model = with_adapter(quantized(weight_only))
    with pytest.raises(DQError, match="fuse_lora"):
        model.fuse_lora(safe_fusing=safe)


def test_training_through_integers_is_refused():
    model = with_adapter(quantized())
    with pytest.raises(DQError, match="no gradient"):
        run(model, 500.0)


def test_training_beside_packed_weights_works():
    model, full = with_adapter(quantized(weight_only=True)), with_adapter(unet().requires_grad_(False))
    gradients = []
    for each in (model, full):
        run(each, 500.0).square().sum().backward()
        found = [p.grad.flatten() for p in each.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
    assert float(nn.functional.cosine_similarity(*gradients, dim=0)) > 0.8


def test_a_denoiser_with_an_adapter_is_not_saved_as_one_without(tmp_path):
    model = with_adapter(copy.deepcopy(quantized()))
    with pytest.raises(DQError, match="save_lora_adapter"):
        model.save_pretrained(tmp_path)
    with pytest.raises(DQError, match="save_lora_adapter"):
        dq_torchao.save(model, tmp_path)
