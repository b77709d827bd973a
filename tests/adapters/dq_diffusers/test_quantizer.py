from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import diffusers_models as models
import dq_torchao
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, TorchAoConfig, UNet2DModel
from diffusers_models import class_pipeline, same, unet
from dq_diffusers.pipelines import PixelClassConditionalPipeline, load_pipeline
from dq_torchao import PlanConfig, TimestepInt8Config, linear_and_conv2d
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao_models import denoiser_plan

from dq_plugins.bundled import bundled
from dq_plugins.errors import CheckpointError, DQError, PlanError
from dq_plugins.plan import LayerPlan, QuantPlan
from dq_plugins.temporal.table import table_section

IN_A_NEW_PROCESS = """
import sys, dq_torchao, numpy as np, torch
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
assert dq_torchao.execution_report(alone) == dq_torchao.execution_report(pipe.unet)
np.save(out, np.concatenate(images))
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> tuple[UNet2DModel, UNet2DModel, QuantPlan, str]:
    """A full-precision U-Net, the same quantized, its plan, and a folder with ``float``, ``quantized`` and ``plan``."""
    folder = tmp_path_factory.mktemp("quantizer")
    model = unet()
    plan = denoiser_plan(model)
    quantized = dq_torchao.apply(copy.deepcopy(model), plan)
    model.save_pretrained(folder / "float")
    quantized.save_pretrained(folder / "quantized")
    plan.save(folder / "plan")
    return model, quantized, plan, folder


def test_a_denoiser_quantized_in_place_is_saved_and_loaded_bit_for_bit(case):
    _, quantized, _, folder = case
    loaded = UNet2DModel.from_pretrained(folder / "quantized")
    assert same(loaded, quantized)
    assert dq_torchao.execution_report(loaded) == dq_torchao.execution_report(quantized)
    assert {p.suffix for p in (folder / "quantized").iterdir()} == {".json", ".safetensors"}


def test_sharded(case, tmp_path):
    case[1].save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same(UNet2DModel.from_pretrained(tmp_path), case[1])


def test_the_file_is_small(case):
    size = {f: (case[3] / f / "diffusion_pytorch_model.safetensors").stat().st_size for f in ("float", "quantized")}
    assert size["quantized"] < 0.6 * size["float"]  # tiny layers: names and scales weigh as much as weights


def test_a_loaded_denoiser_is_saved_again(case, tmp_path):
    UNet2DModel.from_pretrained(case[3] / "quantized").save_pretrained(tmp_path)
    assert same(UNet2DModel.from_pretrained(tmp_path), case[1])
    configs = [json.loads((f / "config.json").read_text()) for f in (tmp_path, case[3] / "quantized")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_variants_have_files_of_their_own(case, tmp_path):
    case[1].save_pretrained(tmp_path, variant="w8a8", max_shard_size="20KB")
    assert same(UNet2DModel.from_pretrained(tmp_path, variant="w8a8"), case[1])
    with pytest.raises(CheckpointError, match=r"has no diffusion_pytorch_model\.safetensors"):
        UNet2DModel.from_pretrained(tmp_path)


def test_quantize_with_the_config_alone_is_saved_too(tmp_path):
    model = unet()
    quantize_(model, TimestepInt8Config(groups=2), linear_and_conv2d)
    models.outputs(model)
    quantize_(model, TimestepInt8Config(step="convert"), linear_and_conv2d)
    model.save_pretrained(tmp_path)
    assert same(UNet2DModel.from_pretrained(tmp_path), model)


def test_half_precision_is_loaded_as_it_was_saved_and_can_be_asked_for(case, tmp_path):
    half = copy.deepcopy(case[1]).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert same(loaded, half, torch.bfloat16)
    asked = UNet2DModel.from_pretrained(case[3] / "quantized", torch_dtype=torch.bfloat16)
    assert same(asked, half, torch.bfloat16)
    assert asked.conv_in.act_scale.dtype == torch.float32


def test_a_device_map_and_released_weights(case, tmp_path):
    model = copy.deepcopy(case[1])
    models.outputs(model)
    assert dq_torchao.release_weights(model) > 0
    model.save_pretrained(tmp_path)
    assert same(UNet2DModel.from_pretrained(tmp_path, device_map="cpu"), case[1])


def test_temporal_tables_are_loaded(tmp_path):
    model, names = unet(), ("time_embedding.linear_1", "time_embedding.linear_2")
    plan = denoiser_plan(model)
    rows = {names[1]: torch.randn(3, 32, generator=torch.Generator().manual_seed(0))}
    plan.sections["temporal-table"] = table_section(models.TIMESTEPS, rows, [names[0]])
    for name in names:
        plan.layers[name] = LayerPlan("linear", kept="in the temporal table")
    dq_torchao.apply(model, plan)
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert same(loaded, model)
    assert type(loaded.time_embedding.linear_1).__name__ == "NotComputed"


def test_copies_of_a_savable_denoiser_are_savable(case, tmp_path):
    copy.deepcopy(case[1]).save_pretrained(tmp_path)
    assert same(UNet2DModel.from_pretrained(tmp_path), case[1])


# Quantizing while loading


@pytest.mark.parametrize("inside", [True, False])
def test_full_precision_weights_are_quantized_while_loading(case, tmp_path, inside):
    _, quantized, plan, folder = case
    config = TorchAoConfig(PlanConfig(plan if inside else folder / "plan"))
    loaded = UNet2DModel.from_pretrained(folder / "float", quantization_config=config)
    assert same(loaded, quantized)
    loaded.save_pretrained(tmp_path)  # what is saved is the quantized denoiser, not the plan
    assert same(UNet2DModel.from_pretrained(tmp_path), quantized)


def test_dtypes_of_full_precision_weights_are_diffusers_concern(case, tmp_path):
    # float8 weights are no dtype of a quantized checkpoint of ours, and may well be quantized while loading
    folder = case[3] / "float"
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    name = "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(folder / name)
    state["conv_in.bias"] = state["conv_in.bias"].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(state, tmp_path / name)
    with pytest.raises(PlanError, match="other weights"):
        UNet2DModel.from_pretrained(tmp_path, quantization_config=TorchAoConfig(PlanConfig(case[2])))


def test_while_loading_the_plan_is_compared_with_the_weights(case, tmp_path):
    unet(seed=1).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="other weights"):
        UNet2DModel.from_pretrained(tmp_path, quantization_config=TorchAoConfig(PlanConfig(case[2])))


def test_a_whole_pipeline_is_quantized_while_loading(tmp_path):
    pipe = class_pipeline()
    plan = denoiser_plan(pipe.transformer)
    pipe.save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(PlanConfig(plan))})
    loaded = PixelClassConditionalPipeline.from_pretrained(tmp_path, quantization_config=config)
    assert same(loaded.transformer, dq_torchao.apply(pipe.transformer, plan))


def test_calibration_can_begin_while_loading(case):
    config = TorchAoConfig(TimestepInt8Config(groups=2))
    model = UNet2DModel.from_pretrained(case[3] / "float", quantization_config=config)
    assert same(model, case[0])
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained("nowhere")
    quantize_(model, TimestepInt8Config(step="convert"), linear_and_conv2d)
    assert {e.state for e in dq_torchao.execution_report(model).values()} == {"integer"}


def test_the_record_of_a_quantized_denoiser_is_no_instruction_to_quantize(case):
    config = TorchAoConfig(case[1].dq_checkpoint)
    with pytest.raises(DQError, match="quantized already"):
        UNet2DModel.from_pretrained(case[3] / "float", quantization_config=config)


def test_torchaos_own_configs_still_go_to_diffusers_quantizer(case):
    config = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    model = UNet2DModel.from_pretrained(case[3] / "float", quantization_config=config, torch_dtype=torch.float32)
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


# Refusals: what comes from outside is checked before it is used, and never unpickled


@pytest.fixture
def folder(case, tmp_path):
    case[1].save_pretrained(tmp_path)
    return tmp_path


def refused(folder, match, **options):
    with pytest.raises(CheckpointError, match=match):
        UNet2DModel.from_pretrained(folder, **options)


class Bomb:
    """What a hostile pickle holds: reading it opens the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_not_opened(folder):
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.with_suffix(".bin").write_bytes(pickle.dumps(Bomb(folder / "went-off")))
    weights.unlink()
    refused(folder, r"only diffusion_pytorch_model\.bin, which is not opened")
    assert not (folder / "went-off").exists()


def test_a_harmless_pickle_is_not_opened_either(folder, case, monkeypatch):
    torch.save(case[1].state_dict(), folder / "diffusion_pytorch_model.bin")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    refused(folder, "which is not opened")
    config = TorchAoConfig(PlanConfig(case[2]))
    (folder / "config.json").write_text((case[3] / "float" / "config.json").read_text())
    refused(folder, "which is not opened", quantization_config=config)


def test_a_pickle_under_a_safe_name_is_not_opened(folder):
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps(Bomb(folder / "went-off")))
    refused(folder, "cannot be read as safetensors")
    assert not (folder / "went-off").exists()


@pytest.mark.parametrize("name", ["evil.bin", "../evil.safetensors", "/evil.safetensors"])
def test_an_index_that_names_other_files_is_refused(folder, name):
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.bias": name}}))
    refused(folder, r"is no safetensors file|must name files beside it")


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(folder, text):
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    refused(folder, "index")


def test_a_truncated_file_is_refused(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, "cannot be read as safetensors")


def test_a_missing_and_a_foreign_shard_are_refused(case, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    case[1].save_pretrained(a, max_shard_size="20KB")
    other = dq_torchao.apply(unet(1), denoiser_plan(unet(1)))
    other.save_pretrained(b, max_shard_size="20KB")
    shard = sorted(a.glob("*.safetensors"))[1]
    shard.write_bytes((b / shard.name).read_bytes())
    refused(a, "not of one checkpoint")
    shard.unlink()
    refused(a, "is missing")


def test_an_edited_config_is_refused(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["quant_type"]["default"]["_data"]["plan"]["groups"]["all"]["edges"] = [1.0, 2.0]
    path.write_text(json.dumps(config))
    refused(folder, "config .* was altered")


def test_a_config_of_a_newer_version_says_so(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["quant_type"]["default"]["_version"] = 99
    path.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="version"), pytest.raises(ValueError, match="newer dq-plugins"):
        UNet2DModel.from_pretrained(folder)


def test_float_weights_under_a_quantized_config_are_refused(folder, case):
    name = "diffusion_pytorch_model.safetensors"
    (folder / name).write_bytes((case[3] / "float" / name).read_bytes())
    refused(folder, "no record of dq-plugins")


def test_a_missing_table_is_refused_with_its_name(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(path)
    del state["conv_in.act_scale"]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_type"]["default"]
    safetensors.torch.save_file(state, path, dq_torchao.checkpoint.integrity_metadata(state, config))
    refused(folder, r"lacks 1 tensors, the first is 'conv_in\.act_scale'")


def test_no_pickle_is_written(case, tmp_path):
    with pytest.raises(DQError, match="writes a pickle"):
        case[1].save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.bin"))


def test_a_model_on_the_hub_must_be_asked_for_as_safetensors(case, monkeypatch):
    monkeypatch.setattr(UNet2DModel, "load_config", lambda *_, **__: (dict(case[0].config), {}, None))
    config = TorchAoConfig(PlanConfig(case[2]))
    refused("someone/something", "use_safetensors=True", quantization_config=config, revision="a" * 40)
