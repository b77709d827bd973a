"""Tools that people put on a denoiser before, while or after it is quantized."""

from __future__ import annotations

import copy

import dq_torchao
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers_models import outputs, same, unet
from dq_torchao import TimestepInt8Config, linear_and_conv2d
from tiny_pipelines import text_pipeline
from torchao.quantization import quantize_

from dq_plugins.errors import DQError, PlanError


def step(model: UNet2DModel, name: str) -> None:
    quantize_(model, TimestepInt8Config(step=name, groups=2, recipe="fast"), linear_and_conv2d)
    if name == "prepare":
        outputs(model)


def by_groups(model: UNet2DModel, kind: str = "leaf_level", **more) -> None:
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks, **more)


def sequentially(model: UNet2DModel) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, torch.device("cpu"), offload_buffers=True)


@pytest.fixture(scope="module")
def quantized() -> UNet2DModel:
    model = unet()
    step(model, "prepare")
    step(model, "convert")
    return model


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_offloading_by_groups_changes_nothing_whenever_it_comes(kind, when, quantized):
    model = unet()
    if when == "before":
        by_groups(model, kind)
    step(model, "prepare")
    if when == "between":
        by_groups(model, kind)
        outputs(model)
    step(model, "convert")
    if when == "after":
        by_groups(model, kind)
    assert same(model, quantized)


def test_sequential_offloading_comes_after_and_says_so_before(quantized):
    model = unet()
    step(model, "prepare")
    step(model, "convert")
    sequentially(model)
    assert same(model, quantized)
    model = unet()
    sequentially(model)
    with pytest.raises(PlanError, match="sequential offloading .* Quantize first"):
        step(model, "prepare")


def test_weights_on_disk_are_not_quantized(tmp_path):
    model = unet()
    by_groups(model, offload_to_disk_path=str(tmp_path))
    with pytest.raises(PlanError, match="group offloading to disk"):
        step(model, "prepare")


@pytest.mark.parametrize("kind", ["leaf_level", "block_level", "sequential", "disk"])
@pytest.mark.parametrize("write", [UNet2DModel.save_pretrained, dq_torchao.save])
def test_weights_that_are_elsewhere_are_not_saved(kind, write, quantized, tmp_path):
    from accelerate import disk_offload
    from accelerate.hooks import remove_hook_from_module

    model = copy.deepcopy(quantized)
    write(model, tmp_path / "saved")
    before = (tmp_path / "saved").rglob("*.safetensors")
    before = {path: path.read_bytes() for path in before}
    if kind == "sequential":
        sequentially(model)
    elif kind == "disk":
        disk_offload(model, tmp_path / "offloaded", torch.device("cpu"), offload_buffers=True)
    else:
        by_groups(model, kind, offload_to_disk_path=str(tmp_path))
    assert same(model, quantized)
    with pytest.raises(DQError, match="are not in memory: .* Save first"):
        write(model, tmp_path / "saved")
    assert {path: path.read_bytes() for path in before} == before
    if kind in ("sequential", "disk"):
        write(remove_hook_from_module(model, recurse=True), tmp_path / "again")
        assert same(model, quantized)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_groups_in_memory_are_saved(kind, quantized, tmp_path):
    model = copy.deepcopy(quantized)
    by_groups(model, kind)
    model.save_pretrained(tmp_path)
    assert same(UNet2DModel.from_pretrained(tmp_path), quantized)


@pytest.mark.parametrize("before", [True, False])
def test_layers_stored_in_8_bits_run_in_integers(before, quantized, tmp_path):
    model = unet()
    cast = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    if before:
        model.enable_layerwise_casting(**cast)
    step(model, "prepare")
    step(model, "convert")
    if not before:
        model.enable_layerwise_casting(**cast)
    assert {each.state for each in dq_torchao.execution_report(model).values()} == {"integer"}
    error = sum(float((a - b).square().sum()) for a, b in zip(outputs(model), outputs(quantized), strict=True))
    assert error < 0.05 * sum(float(b.square().sum()) for b in outputs(quantized))
    model.save_pretrained(tmp_path)
    assert UNet2DModel.from_pretrained(tmp_path).config.quantization_config is not None


def test_copying_the_state_of_an_integer_layer_into_another_kind_is_refused(quantized):
    state = quantized.state_dict()
    quantized.load_state_dict(state)
    with pytest.raises(DQError, match="full-precision denoiser"):
        unet().conv_in.load_state_dict(quantized.conv_in.state_dict())
    with pytest.raises(DQError, match="from_unet"):
        unet().load_state_dict(state)


def test_a_denoiser_without_values_takes_a_state(quantized):
    model = copy.deepcopy(quantized).to("meta").to_empty(device="cpu")
    model.load_state_dict(quantized.state_dict())
    assert same(model, quantized)


@pytest.mark.parametrize("strict", [True, False])
def test_full_precision_weights_are_not_loaded_into_integer_layers(strict, quantized):
    model = copy.deepcopy(quantized)
    with pytest.raises(RuntimeError, match="conv_in: the state is of a full-precision layer"):
        model.load_state_dict(unet(1).state_dict(), strict=strict)


def test_states_are_written_and_read_as_ever(quantized, tmp_path):
    torch.save(quantized.state_dict(), tmp_path / "state.pt")
    quantized.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_a_denoiser_that_torch_ao_quantizes_is_refused():
    model = torch.ao.quantization.quantize_dynamic(unet(), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(PlanError, match=r"torch\.ao"):
        step(model, "prepare")


SEEN = torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(1))
"""What an image encoder makes of a picture."""


def adapted(model: UNet2DConditionModel) -> UNet2DConditionModel:
    """The denoiser with an IP-Adapter of random weights."""
    rng = torch.Generator().manual_seed(2)
    attention = [name.removesuffix(".processor") for name in model.attn_processors if name.endswith("attn2.processor")]
    keys = {}
    for i, name in enumerate(attention):
        shape = model.get_submodule(name).to_k.out_features, model.config.cross_attention_dim
        keys |= {f"{2 * i + 1}.to_{part}_ip.weight": torch.randn(*shape, generator=rng) for part in "kv"}
    width = model.config.cross_attention_dim
    image = {"proj.weight": torch.randn(4 * width, 6, generator=rng), "proj.bias": torch.zeros(4 * width)}
    image |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    model._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": keys}])
    return model


@torch.no_grad()
def seen(model: UNet2DConditionModel, image: torch.Tensor | None = SEEN) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    x, words = torch.randn(1, 3, 4, 4, generator=rng), torch.randn(1, 4, 8, generator=rng)
    more = None if image is None else {"image_embeds": [image]}
    return model(x, torch.tensor(500), words, added_cond_kwargs=more).sample


def as_near(found: torch.Tensor, full: torch.Tensor) -> bool:
    return bool((found - full).square().sum() < 0.02 * full.square().sum())


@pytest.fixture(scope="module")
def with_adapter() -> UNet2DConditionModel:
    model = adapted(text_pipeline().unet)
    quantize_(model, TimestepInt8Config(step="prepare", groups=1, recipe="fast"), linear_and_conv2d)
    seen(model)
    quantize_(model, TimestepInt8Config(step="convert"), linear_and_conv2d)
    return model


def test_an_ip_adapter_is_there_after_quantization_and_kept_by_our_own_files(with_adapter, tmp_path):
    full = adapted(text_pipeline().unet)
    assert as_near(seen(with_adapter), seen(full))
    assert not as_near(seen(text_pipeline().unet, None), seen(full))
    with pytest.raises(DQError, match=r"IP-Adapter .*unload_ip_adapter\(\)"):
        with_adapter.save_pretrained(tmp_path / "pretrained")
    dq_torchao.save(with_adapter, tmp_path / "own")
    loaded = dq_torchao.load(adapted(text_pipeline().unet), tmp_path / "own")
    assert torch.equal(seen(loaded), seen(with_adapter))


def test_an_ip_adapter_that_was_taken_off_leaves_a_denoiser_that_can_be_saved(with_adapter, tmp_path):
    pipe = text_pipeline()
    pipe.unet = copy.deepcopy(with_adapter)
    pipe.unet.encoder_hid_proj = None  # as pipelines' unload_ip_adapter
    pipe.unet.config.encoder_hid_dim_type = None
    pipe.unet.set_default_attn_processor()
    pipe.unet.save_pretrained(tmp_path)
    for again in (tmp_path, tmp_path / "again"):
        loaded = UNet2DConditionModel.from_pretrained(again)
        assert torch.equal(seen(loaded, None), seen(pipe.unet, None))
        loaded.save_pretrained(tmp_path / "again")
    assert as_near(seen(adapted(loaded)), seen(with_adapter))
