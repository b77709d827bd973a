"""What comes from outside is checked before it is used, and never unpickled."""

from __future__ import annotations

import json
import pickle

import dq_torchao
import pytest
import safetensors.torch
import torch
from diffusers import TorchAoConfig, UNet2DModel
from diffusers_models import unet
from dq_torchao import PlanConfig
from hostile import Bomb
from torchao_models import denoiser_plan

from dq_plugins.errors import CheckpointError


@pytest.fixture
def folder(saved_unet, tmp_path):
    saved_unet.quantized.save_pretrained(tmp_path)
    return tmp_path


def refused(folder, match, **options):
    with pytest.raises(CheckpointError, match=match):
        UNet2DModel.from_pretrained(folder, **options)


def test_a_pickle_is_not_opened(folder):
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.with_suffix(".bin").write_bytes(pickle.dumps(Bomb(folder / "went-off")))
    weights.unlink()
    refused(folder, r"only diffusion_pytorch_model\.bin, which is not opened")
    assert not (folder / "went-off").exists()


def test_a_harmless_pickle_is_not_opened_either(folder, saved_unet, monkeypatch):
    torch.save(saved_unet.quantized.state_dict(), folder / "diffusion_pytorch_model.bin")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    refused(folder, "which is not opened")
    config = TorchAoConfig(PlanConfig(saved_unet.plan))
    (folder / "config.json").write_text((saved_unet.folder / "float" / "config.json").read_text())
    refused(folder, "which is not opened", quantization_config=config)


def test_a_pickle_under_a_safe_name_is_not_opened(folder):
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps(Bomb(folder / "went-off")))
    refused(folder, "cannot be read as safetensors")
    assert not (folder / "went-off").exists()


@pytest.mark.parametrize("name", ["evil.bin", "../evil.safetensors", "/evil.safetensors"])
def test_an_index_that_names_other_files_is_refused(folder, name):
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.bias": name}}))
    refused(folder, r"is not a safetensors file|must name files beside it")


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(folder, text):
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    refused(folder, "index")


def test_a_truncated_file_is_refused(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, "cannot be read as safetensors")


def test_a_missing_and_a_foreign_shard_are_refused(saved_unet, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    saved_unet.quantized.save_pretrained(a, max_shard_size="20KB")
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


def test_float_weights_under_a_quantized_config_are_refused(folder, saved_unet):
    name = "diffusion_pytorch_model.safetensors"
    (folder / name).write_bytes((saved_unet.folder / "float" / name).read_bytes())
    refused(folder, "no record of dq-plugins")


def test_a_missing_table_is_refused_with_its_name(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(path)
    del state["conv_in.act_scale"]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_type"]["default"]
    safetensors.torch.save_file(state, path, dq_torchao.checkpoint.integrity_metadata(state, config))
    refused(folder, r"lacks 1 tensors, the first is 'conv_in\.act_scale'")


def test_a_model_on_the_hub_must_be_asked_for_as_safetensors(saved_unet, monkeypatch):
    monkeypatch.setattr(UNet2DModel, "load_config", lambda *_, **__: (dict(saved_unet.full.config), {}, None))
    config = TorchAoConfig(PlanConfig(saved_unet.plan))
    refused("someone/something", "use_safetensors=True", quantization_config=config, revision="a" * 40)
