"""What is wrong with a checkpoint is found before it is used, and said; nothing is ever unpickled."""

from __future__ import annotations

import pickle

import dq_torchao
import pytest
import safetensors.torch
import torch
from artifacts import edit_file, edit_record, replace_text
from dq_torchao.checkpoint_files import CheckpointFiles, integrity_metadata
from hostile import Bomb
from safetensors.torch import save_file
from torch import nn
from torchao_models import build, denoiser_plan

from dq_plugins.errors import CheckpointError, DQError
from dq_plugins.hashing import hash_json


@pytest.fixture
def folder(tmp_path):
    model = build()
    dq_torchao.save(dq_torchao.apply(model, denoiser_plan(model)), tmp_path)
    return tmp_path


def forge(folder, state) -> None:
    """Tampered tensors with hashes that fit: what is left to find is that they cannot be right."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors") | state
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", integrity_metadata(tensors, config_of(folder), carried=True))


def config_of(folder):
    return CheckpointFiles([folder / "model.safetensors"]).record.config


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
    edit_record(folder / "model.safetensors", lambda r: r["config"]["_data"]["options"].update(out_of_range="nearest"))
    with pytest.raises(CheckpointError, match="config .* was altered"):
        dq_torchao.load(build(), folder)


def test_tensors_of_an_unquantized_model_are_refused(folder):
    save_file(build().state_dict(), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="no record of dq-plugins"):
        dq_torchao.load(build(), folder)


def test_a_newer_format_says_so(folder):
    edit_file(folder / "model.safetensors", format_version=99)
    with pytest.raises(CheckpointError, match="format 99.*Upgrade"):
        dq_torchao.load(build(), folder)


@pytest.mark.parametrize("record", ["{", "[]", '{"format_version": 1}', '{"format": "quantized-denoiser"}'])
def test_a_damaged_record_is_refused(folder, record):
    replace_text(folder / "model.safetensors", record)
    with pytest.raises(CheckpointError, match="cannot be read as JSON|is not a record of a quantized denoiser"):
        dq_torchao.load(build(), folder)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"up.act_scale": None}, r"lacks 1 tensors, the first is 'up\.act_scale'"),
        ({"evil.weight": torch.zeros(3)}, "holds unknown 1 tensors"),
        ({"up.act_scale": torch.ones(2)}, r"up\.act_scale.*shape \(2,\).*needs.*\(3,\)"),
        ({"up.weight_packed": torch.zeros(256)}, r"up\.weight_packed.*float32.*needs torch\.uint8"),
        ({"up.act_scale": torch.ones(3, dtype=torch.float16)}, "must be float32"),
        ({"up.act_scale": torch.tensor([1.0, -1.0, 1.0])}, "positive, finite"),
        ({"up.act_scale": torch.tensor([1.0, 1e-44, 1.0])}, "at least 1.18e-38"),
        ({"up.weight_scale": torch.full((32,), torch.nan)}, "positive, finite"),
        (
            {"up.act_zero_point": torch.full((3,), 10**6, dtype=torch.int32)},
            r"must lie in \[-128, 127\]",
        ),
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


def test_a_missing_file_is_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        dq_torchao.load(build(), folder)


def test_a_file_of_another_librarys_folder_says_so(folder):
    tensors, config = safetensors.torch.load_file(folder / "model.safetensors"), config_of(folder)
    save_file(tensors, folder / "model.safetensors", integrity_metadata(tensors, config))
    with pytest.raises(CheckpointError, match="does not hold its quantization config"):
        dq_torchao.load(build(), folder)


@pytest.mark.parametrize("config", [{}, {"_type": "CheckpointConfig"}, {"_type": "Evil", "_data": {}, "_version": 1}])
def test_a_config_that_is_none_is_refused(folder, config):
    def change(record) -> None:
        record.update(config=config, config_hash=hash_json(config))

    edit_record(folder / "model.safetensors", change)
    with pytest.raises(DQError, match="config is"):
        dq_torchao.load(build(), folder)


def reconfigure(folder, change) -> None:
    """Change the config, and make all hashes agree."""

    def changed(record) -> None:
        change(record["config"]["_data"])
        plan = record["config"]["_data"]["plan"]
        plan["hash"] = hash_json({key: value for key, value in plan.items() if key != "hash"})
        record["config_hash"] = hash_json(record["config"])

    edit_record(folder / "model.safetensors", changed)


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
        lambda d: d["tensors"].update({"layers/up.weight.scale": ["float32", [2**29]]}),
        lambda d: d["tensors"].update({"layers/up.weight.scale": ["float32", [2**62]]}),
        lambda d: d["tensors"].update({"layers/up.weight.scale": ["float32", [7]]}),
        lambda d: d["tensors"].update({"layers/up.weight.scale": ["float32", [-1]]}),
        lambda d: d["tensors"].update({"layers/up.weight.scale": ["float8_e4m3fn", [32]]}),
        lambda d: d["executions"]["up"].update(bits="many"),
        lambda d: d["executions"]["up"].update(state="magic"),
        lambda d: d.update(options=[]),
        lambda d: d.update(surprise=1),
        lambda d: d["options"].update(evil=1),
        lambda d: d["options"].update(out_of_range="whatever"),
    ],
)
def test_a_hostile_config_is_refused(folder, change):
    reconfigure(folder, change)
    with pytest.raises(DQError):
        dq_torchao.load(build(), folder)
