"""What comes from outside is checked before it is used, and never unpickled."""

from __future__ import annotations

import json
import pickle

import dq_torchao
import pytest
import safetensors.torch
import torch
from diffusers import UNet2DModel
from diffusers_models import unet
from dq_diffusers import DQConfig
from hostile import Bomb
from torchao_models import denoiser_plan

from dq_plugins.errors import CheckpointError, DQError


@pytest.fixture
def folder(saved_unet, tmp_path):
    saved_unet.quantized.save_pretrained(tmp_path)
    return tmp_path


def refused(folder, match, **options):
    with pytest.raises(CheckpointError, match=match):
        UNet2DModel.from_pretrained(folder, **options)


def by_diffusers(folder, **options):
    """A single file is read before a quantizer is asked; diffusers refuses what it cannot read safely."""
    with pytest.raises(OSError, match="Unable to load weights"):
        UNet2DModel.from_pretrained(folder, **options)


def test_a_hostile_pickle_does_not_run(folder):
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.with_suffix(".bin").write_bytes(pickle.dumps(Bomb(folder / "went-off")))
    weights.unlink()
    by_diffusers(folder)
    assert not (folder / "went-off").exists()


def test_a_pickle_under_a_safe_name_does_not_run(folder):
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps(Bomb(folder / "went-off")))
    by_diffusers(folder)
    assert not (folder / "went-off").exists()


def test_a_harmless_pickle_is_refused_too(folder, saved_unet):
    torch.save(saved_unet.quantized.state_dict(), folder / "diffusion_pytorch_model.bin")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    refused(folder, r"diffusion_pytorch_model\.bin is not a safetensors file")
    (folder / "config.json").write_text((saved_unet.folder / "float" / "config.json").read_text())
    torch.save(saved_unet.full.state_dict(), folder / "diffusion_pytorch_model.bin")
    refused(folder, "is not a safetensors file", quantization_config=DQConfig(saved_unet.plan))


def test_pickles_among_shards_are_not_opened(folder):
    (folder / "evil.bin").write_bytes(pickle.dumps(Bomb(folder / "went-off")))
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.bias": "evil.bin"}}))
    refused(folder, r"evil\.bin is not a safetensors file")
    assert not (folder / "went-off").exists()


def test_files_of_other_folders_are_refused(saved_unet, tmp_path):
    quantizer = saved_unet.quantized.hf_quantizer
    with pytest.raises(CheckpointError, match="lie beside each other"):
        quantizer.maybe_update_loaded_keys([], [f"{tmp_path}/a/1.safetensors", f"{tmp_path}/b/2.safetensors"])


def test_a_truncated_file_is_refused(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    by_diffusers(folder)


def test_a_truncated_shard_is_refused(saved_unet, tmp_path):
    saved_unet.quantized.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(tmp_path, "cannot be read as safetensors")


def test_a_foreign_shard_is_refused(saved_unet, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    saved_unet.quantized.save_pretrained(a, max_shard_size="20KB")
    other = dq_torchao.apply(unet(1), denoiser_plan(unet(1)))
    other.save_pretrained(b, max_shard_size="20KB")
    shard = sorted(a.glob("*.safetensors"))[1]
    shard.write_bytes((b / shard.name).read_bytes())
    refused(a, "not of one checkpoint")


def test_an_edited_config_is_refused(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config"]["_data"]["plan"]["record"]["groups"]["all"]["edges"] = [1.0, 2.0]
    path.write_text(json.dumps(config))
    refused(folder, "config .* was altered")


def test_a_config_of_a_newer_version_says_so(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config"]["_version"] = 99
    path.write_text(json.dumps(config))
    with pytest.raises(DQError, match="newer dq-plugins"):
        UNet2DModel.from_pretrained(folder)


def test_a_missing_table_is_refused_with_its_name(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(path)
    del state["conv_in.act_scale"]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]["config"]
    safetensors.torch.save_file(state, path, dq_torchao.checkpoint.integrity_metadata(state, config))
    refused(folder, r"lacks 1 tensors, the first is 'conv_in\.act_scale'")
