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
from dq_plugins.plan import LowRank, Reason
from dq_plugins.timesteps import context_of

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


def branched(branch_bits: int = 16, **options) -> UNet2DConditionModel:
    """A quantized U-Net some of whose layers have a branch of their own, and some are in full precision."""
    model, g = unet(), torch.Generator().manual_seed(3)
    plan = denoiser_plan(model)
    for name, layer in plan.layers.items():
        weight = model.get_submodule(name).weight
        if name.endswith("to_q"):
            down, up = torch.randn(2, weight[0].numel(), generator=g) / 8, torch.randn(len(weight), 2, generator=g) / 8
            layer.low_rank = LowRank(down.half(), up.half())
            layer.low_rank = layer.low_rank.in_8_bits() if branch_bits == 8 else layer.low_rank
        if name.endswith("attn2.to_v"):  # its weight takes the adapter
            layer.weight, layer.activation, layer.unquantized_reason = None, None, Reason("full precision")
        if name.endswith("conv1"):
            layer.activation.bits = 16 if options.get("wide") else 8
    return dq_torchao.apply(model, plan)


def layer_calls(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of every layer with an adapter, at one timestep."""
    found = {}
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: found.update({name: (args[0], out)}))
        for name, module in layers.items()
    ]
    run(model, 900.0)
    for hook in hooks:
        hook.remove()
    return found


def assert_layers_agree(model: nn.Module, calls: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    for name, (x, y) in calls.items():
        with context_of(model).select(900.0):
            torch.testing.assert_close(model.get_submodule(name)(x), y, rtol=2e-3, atol=2e-3 * float(y.abs().max()))


@pytest.mark.parametrize("base", ["integers", "weights alone", "simulated", "branches", "branches in 8 bits"])
@torch.no_grad()
def test_merged_into_branches_an_adapter_does_what_it_does_beside_the_layers(base, tmp_path):
    make = {
        "integers": quantized, "weights alone": lambda: quantized(weight_only=True),
        "simulated": lambda: branched(wide=True), "branches": branched, "branches in 8 bits": lambda: branched(8),
    }[base]  # fmt: skip
    model = with_adapter(make())
    model.set_adapters(["default"], weights=[0.7])
    calls, before, plain = layer_calls(model), run(model, 900.0), run(make(), 900.0)
    assert dq_torchao.merge_lora(model) == len(calls) > 4
    assert_layers_agree(model, calls)
    # rounding differences of float16 tip codes of 8 bits in later layers
    assert float((run(model, 900.0) - before).norm() / (plain - before).norm()) < 0.1
    assert not any("lora" in name or "base_layer" in name for name, _ in model.named_modules())
    model.save_pretrained(tmp_path / "library")
    dq_torchao.save(model, tmp_path / "ours")
    for loaded in (
        UNet2DConditionModel.from_pretrained(tmp_path / "library"),
        dq_torchao.load(unet(), tmp_path / "ours"),
    ):
        assert torch.equal(run(loaded, 100.0), run(model, 100.0))


@torch.no_grad()
def test_two_adapters_are_merged_at_once_and_others_can_follow():
    model = with_adapter(quantized())
    torch.manual_seed(5)
    config = peft.LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False)
    model.add_adapter(config, adapter_name="second")
    with pytest.raises(DQError, match=r"adapter 'default' of layer .* is not active"):
        dq_torchao.merge_lora(model)
    model.set_adapters(["default", "second"], weights=[1.0, 0.5])
    calls = layer_calls(model)
    dq_torchao.merge_lora(model)
    assert_layers_agree(model, calls)
    assert {layer.low_rank.rank for name, layer in model.named_modules() if name.endswith("to_q")} == {5}
    with pytest.raises(DQError, match="has no LoRA adapter"):
        dq_torchao.merge_lora(model)
    calls = layer_calls(with_adapter(model))
    dq_torchao.merge_lora(model)
    assert_layers_agree(model, calls)


def test_what_a_branch_does_not_hold_is_refused_and_nothing_changes():
    with pytest.raises(DQError, match="not quantized"):
        dq_torchao.merge_lora(with_adapter(unet()))
    model = quantized(weight_only=True)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS, lora_bias=True, init_lora_weights=False))
    with torch.no_grad():
        before = run(model, 500.0)
        with pytest.raises(DQError, match="bias of its own"):
            dq_torchao.merge_lora(model)
        assert torch.equal(run(model, 500.0), before)
