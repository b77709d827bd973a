from __future__ import annotations

import copy
import json
import pickle

import dq_torchao
import pytest
import safetensors.torch
import torch
from dq_torchao import checkpoint_config, restoring
from dq_torchao.kernels import Kernel
from safetensors import safe_open
from torch import nn
from torchao_models import TIMESTEPS, Denoiser, denoiser_plan, sqnr

from dq_plugins.errors import CheckpointError, DQError
from dq_plugins.hashing import hash_json
from dq_plugins.plan import LayerPlan, QuantPlan
from dq_plugins.temporal.table import table_section
from dq_plugins.tokens.exact import SECTION, ExactTokens, tokens_section


def build(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser().eval().requires_grad_(False)


def outputs(model: nn.Module) -> list[torch.Tensor]:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return [model(x, torch.tensor(t)) for t in (*TIMESTEPS, [100.0, 900.0])]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True))


def quantized(plan: QuantPlan | None = None, **options) -> Denoiser:
    model = build()
    return dq_torchao.apply(model, plan or denoiser_plan(model), **options)


def tabled(model: Denoiser) -> QuantPlan:
    plan = denoiser_plan(model)
    rows = {"time": model.time(torch.tensor(TIMESTEPS)[:, None] / 1000)}
    plan.sections["temporal-table"] = table_section(TIMESTEPS, rows, [])
    plan.layers["time"] = LayerPlan("linear", kept="looked up in the temporal table")
    return plan


def mixed(model: Denoiser) -> QuantPlan:
    plan = denoiser_plan(model, weight_bits=4)
    plan.layers["up"].activation, plan.layers["up"].kept = None, "weight only"
    plan.layers["down"].activation.bits = 16
    plan.layers["conv_out"] = LayerPlan("conv2d", kept="it makes the image")
    return plan


def with_tokens(model: Denoiser) -> QuantPlan:
    plan = denoiser_plan(model)
    rows = model.conv_in(torch.zeros(1, 4, 8, 8)).flatten(2).transpose(1, 2)[0, :1]
    known = ExactTokens((0,), rows, torch.full((1, 32), 3.0))
    plan.sections[SECTION] = tokens_section({"up": known}, {})
    return plan


@pytest.mark.parametrize("make", [denoiser_plan, mixed, tabled, with_tokens])
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path, make):
    model = quantized(make(build()))
    dq_torchao.save(model, tmp_path)
    loaded = dq_torchao.load(build(seed=1), tmp_path)
    assert dq_torchao.execution_report(loaded) == dq_torchao.execution_report(model)
    if make is tabled:
        x = torch.randn(2, 4, 8, 8)
        assert all(torch.equal(model(x, torch.tensor(t)), loaded(x, torch.tensor(t))) for t in TIMESTEPS)
    else:
        assert same(model, loaded)
    assert not [p.name for p in tmp_path.iterdir() if p.suffix not in (".json", ".safetensors")]


def test_a_denoiser_on_the_meta_device_is_enough(tmp_path):
    model = quantized()
    dq_torchao.save(model, tmp_path)
    with torch.device("meta"):
        empty = Denoiser()
    loaded = dq_torchao.load(empty, tmp_path)
    assert same(model, loaded)
    assert not any(t.is_meta for t in loaded.state_dict().values())


def test_a_loaded_denoiser_is_saved_again_to_the_same_bytes(tmp_path):
    dq_torchao.save(quantized(), tmp_path / "a")
    dq_torchao.save(dq_torchao.load(build(1), tmp_path / "a"), tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_cast_denoiser_comes_back_in_its_dtypes(tmp_path):
    model = quantized().to(torch.bfloat16)
    dq_torchao.save(model, tmp_path)
    loaded = dq_torchao.load(build(1), tmp_path)
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(state[name].dtype == expected[name].dtype for name in state)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert (loaded.conv_in.bias.dtype, loaded.up.act_scale.dtype) == (torch.bfloat16, torch.float32)


def test_the_state_dict_is_loaded_by_torch_itself():
    donor = build(seed=1)
    plan = denoiser_plan(donor, act_bits=7)
    donor = dq_torchao.apply(donor, plan)
    model = build()
    plan.model_hash = denoiser_plan(model).model_hash
    dq_torchao.apply(model, plan)
    assert not same(model, donor)
    model.load_state_dict(donor.state_dict())
    assert same(model, donor)


def test_choices_of_tuning_are_kept(tmp_path):
    model = quantized(choices={"up": dq_torchao.Timing(integer=2.0, floating=1.0)})
    dq_torchao.save(model, tmp_path)
    report = dq_torchao.execution_report(dq_torchao.load(build(1), tmp_path))
    assert report["up"].state == "full precision"
    assert report["up"] == dq_torchao.execution_report(model)["up"]


def test_without_the_kernel_the_layer_is_simulated_and_says_so(tmp_path, monkeypatch):
    model = quantized()
    dq_torchao.save(model, tmp_path)
    monkeypatch.setattr(restoring, "kernel_for", lambda *_: Kernel("", "", "this processor cannot"))
    loaded = dq_torchao.load(build(1), tmp_path)
    execution = dq_torchao.execution_report(loaded)["up"]
    assert (execution.state, execution.reason) == ("simulated", "this processor cannot")
    for a, b in zip(outputs(model), outputs(loaded), strict=True):
        assert sqnr(a, b) > 45


def test_a_denoiser_that_is_not_quantized_is_not_saved(tmp_path):
    with pytest.raises(DQError, match="was not quantized by dq_torchao"):
        dq_torchao.save(build(), tmp_path)


# Refusals


@pytest.fixture
def folder(tmp_path):
    dq_torchao.save(quantized(), tmp_path)
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
    class Bomb:
        def __reduce__(self):
            return (open, (str(folder / "went-off"), "w"))

    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
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
        lambda d: d["tensors"].update({"layers/up/weight.scale": ["load", [3]]}),
        lambda d: d["tensors"].update({"layers/up/weight.scale": "x"}),
        lambda d: d["tensors"].pop("layers/up/weight.scale"),
        lambda d: d["plan"].update(format_version=99),
        lambda d: d["plan"]["layers"]["up"].update(activation=None, kept="x"),
        lambda d: d["plan"]["layers"]["up"]["weight"].update(bits=12),
        lambda d: d["options"].update(evil=1),
        lambda d: d["options"].update(out_of_range="whatever"),
    ],
)
def test_a_hostile_config_is_refused(folder, change):
    reconfigure(folder, change)
    with pytest.raises(DQError):
        dq_torchao.load(build(), folder)


def test_executions_of_a_copy_are_its_own():
    model = quantized()
    clone = copy.deepcopy(model)
    config = checkpoint_config.checkpoint_config_of(clone)
    assert config == checkpoint_config.checkpoint_config_of(model)
    assert config is not checkpoint_config.checkpoint_config_of(model)
