"""What is wrong with a checkpoint is found before it is used, and said; nothing is ever unpickled."""

from __future__ import annotations

import json
import pickle

import dq_torchao
import pytest
import safetensors.torch
import torch
from hostile import Bomb
from safetensors import safe_open
from torch import nn
from torchao_models import build, denoiser_plan

from dq_plugins.errors import CheckpointError, DQError
from dq_plugins.hashing import hash_json


@pytest.fixture
def folder(tmp_path):
    model = build()
    dq_torchao.save(dq_torchao.apply(model, denoiser_plan(model)), tmp_path)
    return tmp_path


def rewrite(folder, state=None, metadata=None) -> None:
    """Write the tensors again, with changes."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        kept = file.metadata()
    tensors = safetensors.torch.load_file(path) | (state or {})
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.torch.save_file(tensors, path, metadata or kept)


def forge(folder, state) -> None:
    """Tampered tensors with hashes that fit: what is left to find is that they cannot be right."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors") | state
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    metadata = dq_torchao.checkpoint.integrity_metadata(tensors, config)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata)


def test_a_truncated_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        dq_torchao.load(build(), folder)


def test_a_flipped_bit_is_refused(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="their hash differs"):
        dq_torchao.load(build(), folder)


def test_a_pickle_under_the_name_is_never_unpickled(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(folder / "went-off")))
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        dq_torchao.load(build(), folder)
    (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(CheckpointError, match="missing"):
        dq_torchao.load(build(), folder)
    assert not (folder / "went-off").exists()


def test_an_edited_config_is_refused(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"out_of_range": "error"', '"out_of_range": "nearest"'))
    with pytest.raises(CheckpointError, match="config .* was altered"):
        dq_torchao.load(build(), folder)


def test_tensors_of_an_unquantized_model_are_refused(folder):
    safetensors.torch.save_file(build().state_dict(), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="no record of dq-plugins"):
        dq_torchao.load(build(), folder)


def test_a_newer_format_says_so(folder):
    rewrite(folder, metadata={"dq_plugins": json.dumps({"format_version": 2, "what": "ever"})})
    with pytest.raises(CheckpointError, match="format 2.*Upgrade"):
        dq_torchao.load(build(), folder)


@pytest.mark.parametrize("record", ["{", "[]", '{"format_version": 1}', '{"format_version": "x"}'])
def test_a_damaged_record_is_refused(folder, record):
    rewrite(folder, metadata={"dq_plugins": record})
    with pytest.raises(CheckpointError, match="damaged"):
        dq_torchao.load(build(), folder)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"up.act_scale": None}, r"lacks 1 tensors, the first is 'up\.act_scale'"),
        ({"evil.weight": torch.zeros(3)}, "holds unknown 1 tensors"),
        ({"up.act_scale": torch.ones(2)}, r"up\.act_scale.*shape \(2,\).*needs.*\(3,\)"),
        ({"up.weight_packed": torch.zeros(256)}, r"up\.weight_packed.*float32.*needs torch\.uint8"),
        ({"up.act_scale": torch.ones(3, dtype=torch.float16)}, "must be float32"),
        ({"up.act_scale": torch.tensor([1.0, -1.0, 1.0])}, "positive and finite"),
        ({"up.weight_scale": torch.full((32,), torch.nan)}, "positive and finite"),
        ({"up.act_zero_point": torch.full((3,), 10**6, dtype=torch.int32)}, "zero points"),
        ({"dq_timestep_groups.all_edges": torch.tensor([7.0, 3.0]).double()}, "timestep groups .* damaged"),
    ],
)
def test_tensors_that_cannot_be_right_are_refused(folder, state, message):
    forge(folder, state)
    with pytest.raises(CheckpointError, match=message):
        dq_torchao.load(build(), folder)


def test_another_denoiser_is_refused(folder):
    with pytest.raises(CheckpointError, match="does not have"):
        dq_torchao.load(nn.Sequential(nn.Linear(2, 2)), folder)


def test_missing_files_are_named(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        dq_torchao.load(build(), folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"quantization_config": {}}'])
def test_a_config_that_is_none_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(DQError, match="config"):
        dq_torchao.load(build(), folder)


def reconfigure(folder, change) -> None:
    """Change the config, and make the tensors' record agree."""
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    change(whole["quantization_config"]["_data"])
    path.write_text(json.dumps(whole))
    with safe_open(folder / "model.safetensors", "pt") as file:
        record = json.loads(file.metadata()["dq_plugins"])
    record["config_hash"] = hash_json(whole["quantization_config"])
    rewrite(folder, metadata={"dq_plugins": json.dumps(record)})


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["executions"].pop("up"),
        lambda d: d["executions"]["up"].update(form="Evil"),
        lambda d: d["executions"]["up"].update(form="IntegerConv2d"),
        lambda d: d["executions"]["up"].update(surprise="x"),
        lambda d: d["tensors"].update({"layers/up.weight.scale": ["load", [3]]}),
        lambda d: d["tensors"].update({"layers/up.weight.scale": "x"}),
        lambda d: d["tensors"].pop("layers/up.weight.scale"),
        lambda d: d["plan"].update(format_version=99),
        lambda d: d["plan"]["record"]["layers"]["up"].update(activation=None, unquantized_reason={"text": "x"}),
        lambda d: d["plan"]["record"]["layers"]["up"]["weight"].update(bits=12),
        lambda d: d["options"].update(evil=1),
        lambda d: d["options"].update(out_of_range="whatever"),
    ],
)
def test_a_hostile_config_is_refused(folder, change):
    reconfigure(folder, change)
    with pytest.raises(DQError):
        dq_torchao.load(build(), folder)
