from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import partial

import diffusers_models as models
import dq_torchao
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import (
    DiffusionPipeline,
    FluxTransformer2DModel,
    PipelineQuantizationConfig,
    TorchAoConfig,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers_models import class_pipeline, same, unet
from dq_diffusers import DQConfig
from dq_diffusers.pipelines import PixelClassConditionalPipeline
from dq_diffusers.recording import load_pipeline
from dq_torchao import PlanConfig, TimestepInt8Config, linear_and_conv2d
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao_models import corrected_plan, denoiser_plan, sqnr

from dq_plugins.bundled_denoisers import bundled
from dq_plugins.errors import DQError, PlanError
from dq_plugins.plan import BiasCorrection, LayerPlan, Reason
from dq_plugins.quantized.simulate import SimulateAdapter
from dq_plugins.quantized.table_lookup import tabulated

IN_A_NEW_PROCESS = """
import sys, numpy as np, torch
from diffusers import UNet2DConditionModel
from dq_diffusers import load_pipeline

whole, sharded, out = sys.argv[1:]
images = []
for folder in (whole, sharded):
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images.append(pipe(["fox face"], num_inference_steps=2, generator=generator, output_type="np").images)
alone = UNet2DConditionModel.from_pretrained(whole, subfolder="unet")
import dq_torchao
assert dq_torchao.execution_report(alone) == dq_torchao.execution_report(pipe.unet)
np.save(out, np.concatenate(images))
"""


def test_a_denoiser_quantized_in_place_is_saved_and_loaded_bit_for_bit(saved_unet):
    quantized, folder = saved_unet.quantized, saved_unet.folder
    loaded = UNet2DModel.from_pretrained(folder / "quantized")
    assert same(loaded, quantized)
    assert dq_torchao.execution_report(loaded) == dq_torchao.execution_report(quantized)
    assert {p.suffix for p in (folder / "quantized").iterdir()} == {".json", ".safetensors"}


def test_sharded(saved_unet, tmp_path):
    saved_unet.quantized.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same(UNet2DModel.from_pretrained(tmp_path), saved_unet.quantized)


def test_the_file_is_small(saved_unet):
    size = {
        f: (saved_unet.folder / f / "diffusion_pytorch_model.safetensors").stat().st_size
        for f in ("float", "quantized")
    }
    assert size["quantized"] < 0.6 * size["float"]  # tiny layers: names and scales weigh as much as weights


def test_a_loaded_denoiser_is_saved_again(saved_unet, tmp_path):
    UNet2DModel.from_pretrained(saved_unet.folder / "quantized").save_pretrained(tmp_path)
    assert same(UNet2DModel.from_pretrained(tmp_path), saved_unet.quantized)
    configs = [json.loads((f / "config.json").read_text()) for f in (tmp_path, saved_unet.folder / "quantized")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_variants_have_files_of_their_own(saved_unet, tmp_path):
    saved_unet.quantized.save_pretrained(tmp_path, variant="w8a8", max_shard_size="20KB")
    assert same(UNet2DModel.from_pretrained(tmp_path, variant="w8a8"), saved_unet.quantized)
    with pytest.raises(OSError, match=r"no file named diffusion_pytorch_model"):
        UNet2DModel.from_pretrained(tmp_path)


def test_quantize_with_the_config_alone_is_saved_too(tmp_path):
    model = unet()
    quantize_(model, TimestepInt8Config(groups=2), linear_and_conv2d)
    models.outputs(model)
    quantize_(model, TimestepInt8Config(step="convert"), linear_and_conv2d)
    model.save_pretrained(tmp_path)
    assert same(UNet2DModel.from_pretrained(tmp_path), model)


def test_half_precision_is_loaded_as_it_was_saved_and_can_be_asked_for(saved_unet, tmp_path):
    half = copy.deepcopy(saved_unet.quantized).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert same(loaded, half, torch.bfloat16)
    asked = UNet2DModel.from_pretrained(saved_unet.folder / "quantized", torch_dtype=torch.bfloat16)
    assert same(asked, half, torch.bfloat16)
    assert asked.conv_in.act_scale.dtype == torch.float32


def buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_buffers())


@pytest.mark.parametrize("cast", ["before", "after", "while loading"])
def test_buffers_that_are_not_saved_come_back_in_their_dtype(cast, tmp_path):
    model = models.dit()
    if cast == "before":
        model.to(torch.bfloat16)
    if cast == "while loading":  # the table of positions is float32 then, and bfloat16 where the model is cast
        model.save_pretrained(tmp_path / "float")
        model = type(model).from_pretrained(tmp_path / "float", torch_dtype=torch.bfloat16)
    dq_torchao.apply(model, denoiser_plan(model))
    if cast == "after":
        model.to(torch.bfloat16)
    for folder in (tmp_path / "once", tmp_path / "twice"):
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder)
        for name, buffer in buffers(model).items():
            assert torch.equal(buffers(loaded)[name], buffer), name
            assert buffers(loaded)[name].dtype == buffer.dtype, name
        model = loaded


def test_a_device_map_and_released_weights(saved_unet, tmp_path):
    model = copy.deepcopy(saved_unet.quantized)
    models.outputs(model)
    assert dq_torchao.release_weights(model) > 0
    model.save_pretrained(tmp_path)
    assert same(UNet2DModel.from_pretrained(tmp_path, device_map="cpu"), saved_unet.quantized)


def test_temporal_tables_are_loaded(tmp_path):
    model, names = unet(), ("time_embedding.linear_1", "time_embedding.linear_2")
    plan = denoiser_plan(model)
    rows = {names[1]: torch.randn(3, 32, generator=torch.Generator().manual_seed(0))}
    plan.temporal_table = tabulated(models.TIMESTEPS, rows, [names[0]])
    for name in names:
        plan.layers[name] = LayerPlan("linear", unquantized_reason=Reason("in the temporal table"))
    dq_torchao.apply(model, plan)
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert same(loaded, model)
    assert type(loaded.time_embedding.linear_1).__name__ == "NotComputed"


def test_copies_of_a_savable_denoiser_are_savable(saved_unet, tmp_path):
    copy.deepcopy(saved_unet.quantized).save_pretrained(tmp_path)
    assert same(UNet2DModel.from_pretrained(tmp_path), saved_unet.quantized)


def test_no_pickle_is_written(saved_unet, tmp_path):
    with pytest.raises(DQError, match="writes a pickle"):
        saved_unet.quantized.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.bin"))


# Quantizing while loading


@pytest.mark.parametrize("inside", [True, False])
def test_full_precision_weights_are_quantized_while_loading(saved_unet, tmp_path, inside):
    _, quantized, plan, folder = saved_unet
    config = DQConfig(plan if inside else folder / "plan")
    loaded = UNet2DModel.from_pretrained(folder / "float", quantization_config=config)
    assert same(loaded, quantized)
    loaded.save_pretrained(tmp_path)  # what is saved is the quantized denoiser, not the plan
    assert same(UNet2DModel.from_pretrained(tmp_path), quantized)


def test_dtypes_of_full_precision_weights_are_diffusers_concern(saved_unet, tmp_path):
    # float8 is not a dtype of our quantized checkpoints, and may well be quantized while loading
    folder = saved_unet.folder / "float"
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    name = "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(folder / name)
    state["conv_in.bias"] = state["conv_in.bias"].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(state, tmp_path / name)
    with pytest.raises(PlanError, match="other weights"):
        UNet2DModel.from_pretrained(tmp_path, quantization_config=DQConfig(saved_unet.plan))


def test_while_loading_the_plan_is_compared_with_the_weights(saved_unet, tmp_path):
    unet(seed=1).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="other weights"):
        UNet2DModel.from_pretrained(tmp_path, quantization_config=DQConfig(saved_unet.plan))


def test_a_whole_pipeline_is_quantized_while_loading(tmp_path):
    pipe = class_pipeline()
    plan = denoiser_plan(pipe.transformer)
    pipe.save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(quant_mapping={"transformer": DQConfig(plan)})
    loaded = PixelClassConditionalPipeline.from_pretrained(tmp_path, quantization_config=config)
    assert same(loaded.transformer, dq_torchao.apply(pipe.transformer, plan))


def test_a_single_file_is_quantized_while_loading(tmp_path):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6), guidance_embeds=False,
    ).eval()  # fmt: skip
    plan = denoiser_plan(model)
    model.save_config(tmp_path)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "one.safetensors")
    given = {"config": str(tmp_path), "local_files_only": True, "torch_dtype": torch.float32}
    file = str(tmp_path / "one.safetensors")
    ignored = FluxTransformer2DModel.from_single_file(
        file, quantization_config=TorchAoConfig(PlanConfig(plan)), **given
    )
    with pytest.raises(PlanError, match=r"is in full precision.*PlanConfig.*from_single_file.*dq_torchao.apply"):
        dq_torchao.execution_report(ignored)
    loaded = FluxTransformer2DModel.from_single_file(file, quantization_config=DQConfig(plan), **given)
    expected = dq_torchao.apply(model, plan)
    assert dq_torchao.execution_report(loaded) == dq_torchao.execution_report(expected)
    assert all(torch.equal(a, expected.state_dict()[name]) for name, a in loaded.state_dict().items())


def test_what_was_set_on_the_config_after_it_was_made_is_kept():
    model = unet()
    model.config.class_embed_type = "set by a loader of adapters"
    dq_torchao.apply(model, denoiser_plan(model))
    assert model.config.class_embed_type == "set by a loader of adapters"
    assert model.config.quantization_config.config is model.dq_checkpoint


def test_calibration_can_begin_while_loading(saved_unet):
    config = DQConfig(config=TimestepInt8Config(groups=2))
    model = UNet2DModel.from_pretrained(saved_unet.folder / "float", quantization_config=config)
    assert same(model, saved_unet.full)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained("nowhere")
    quantize_(model, TimestepInt8Config(step="convert"), linear_and_conv2d)
    assert {e.state for e in dq_torchao.execution_report(model).values()} == {"integer"}


def test_the_record_of_a_quantized_denoiser_is_no_instruction_to_quantize(saved_unet):
    config = DQConfig(config=saved_unet.quantized.dq_checkpoint)
    with pytest.raises(DQError, match="quantized already"):
        UNet2DModel.from_pretrained(saved_unet.folder / "float", quantization_config=config)


def test_torchaos_own_configs_still_go_to_diffusers_quantizer(saved_unet):
    config = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    model = UNet2DModel.from_pretrained(
        saved_unet.folder / "float", quantization_config=config, torch_dtype=torch.float32
    )
    assert type(model.time_embedding.linear_1.weight.data).__name__ == "Int8Tensor"


# Pipelines


def test_a_pipeline_comes_back_bit_for_bit_in_a_new_process(tmp_path):
    pipe = load_pipeline(bundled("emoji"))
    dq_torchao.apply(pipe.unet, denoiser_plan(pipe.unet, weight_bits=4))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images = pipe(["fox face"], num_inference_steps=2, generator=generator, output_type="np").images
    pipe.save_pretrained(tmp_path / "whole")
    pipe.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert len(list((tmp_path / "sharded" / "unet").glob("*.safetensors"))) > 2
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    script, out = tmp_path / "load.py", tmp_path / "images.npy"
    script.write_text(IN_A_NEW_PROCESS)
    command = [sys.executable, script, tmp_path / "whole", tmp_path / "sharded", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.array_equal(np.load(out), np.concatenate([images, images]))


def test_diffusers_own_pipelines(tmp_path):
    from diffusers import DDIMPipeline, DDIMScheduler

    pipe = DDIMPipeline(unet(), DDIMScheduler())
    dq_torchao.apply(pipe.unet, denoiser_plan(pipe.unet))
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert same(loaded.unet, pipe.unet)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_balanced_and_corrected_layers_of_a_u_net_are_saved_and_loaded_bit_for_bit(dtype, tmp_path):
    quantized, simulated = unet(), unet()
    plan = corrected_plan(quantized)
    one = next(name for name, layer in plan.layers.items() if layer.bias_correction is not None)
    plan.layers[one].bias_correction = BiasCorrection(plan.layers[one].bias_correction.values[:1])
    dq_torchao.apply(quantized, plan)
    SimulateAdapter().apply(simulated, plan)
    for a, b in zip(models.outputs(simulated), models.outputs(quantized), strict=True):
        assert sqnr(a, b) > 40
    quantized.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert same(loaded, quantized.to(dtype or torch.float32), dtype or torch.float32)
    tables = [t for name, t in loaded.state_dict().items() if name.endswith(("inverse_balance", "bias_correction"))]
    assert len(tables) > 10
    assert {t.dtype for t in tables} == {torch.float32}


def test_what_is_made_from_the_config_of_a_quantized_denoiser_is_in_full_precision_saved_and_loaded_too(
    saved_unet, tmp_path, caplog
):
    made = UNet2DModel.from_config(UNet2DModel.from_pretrained(saved_unet.folder / "quantized").config).eval()
    made.save_pretrained(tmp_path / "made")
    loaded = UNet2DModel.from_pretrained(tmp_path / "made")
    assert "holds full-precision weights" in caplog.text
    assert same(loaded, made)
    assert not any(dq_torchao.execution_report(loaded))
    loaded.save_pretrained(tmp_path / "again")
    assert same(UNet2DModel.from_pretrained(tmp_path / "again"), made)


def fusable() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def test_projections_fused_before_quantization_are_saved_and_loaded(tmp_path):
    model = fusable()
    model.fuse_qkv_projections()
    call = {"sample": torch.ones(1, 4, 8, 8), "timestep": torch.tensor(500.0)}
    call["encoder_hidden_states"] = torch.ones(1, 3, 8)
    dq_torchao.apply(model, denoiser_plan(model))
    model.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert any("to_qkv" in n and e.state == "integer" for n, e in dq_torchao.execution_report(loaded).items())
    assert torch.equal(loaded(**call).sample, model(**call).sample)


def transformer() -> FluxTransformer2DModel:
    """Its attention lets go of the fused layers, where the U-Net's keeps them."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=[4, 4, 8],
    ).eval()  # fmt: skip


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("make", [fusable, transformer])
def test_projections_separated_after_quantization_are_not_saved_as_fused_ones(make, loaded, tmp_path):
    model = make()
    model.fuse_qkv_projections()
    dq_torchao.apply(model, denoiser_plan(model))
    if loaded:
        model.save_pretrained(tmp_path / "fused")
        model = type(model).from_pretrained(tmp_path / "fused")
    model.unfuse_qkv_projections()
    with pytest.raises(DQError, match=r"fused when the denoiser was quantized.*without fusing them"):
        model.save_pretrained(tmp_path / "separate")
    assert not list((tmp_path / "separate").glob("*.safetensors"))
    model.fuse_qkv_projections()  # in full precision
    for save in (model.save_pretrained, partial(dq_torchao.save, model)):
        with pytest.raises(DQError, match=r"layer '.*to_qkv' .* in full precision have taken their place"):
            save(tmp_path / "again")


def test_modules_added_after_quantization_are_not_saved_into_a_checkpoint_that_cannot_be_loaded(tmp_path):
    model = fusable()
    dq_torchao.apply(model, denoiser_plan(model))
    model.fuse_qkv_projections()
    with pytest.raises(DQError, match=r"modules that it did not have when it was quantized.*to_qkv"):
        model.save_pretrained(tmp_path)
