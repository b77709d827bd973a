from __future__ import annotations

import copy

import dq_torchao
import pytest
import torch
from dq_torchao import checkpoint_config, restoring
from dq_torchao.kernels import Kernel
from torch import nn
from torchao_models import TIMESTEPS, Denoiser, build, denoiser_plan, sqnr

from dq_plugins.errors import DQError
from dq_plugins.plan import LayerPlan, OutlierRows, QuantPlan, Reason
from dq_plugins.quantized.table_lookup import tabulated


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
    plan.temporal_table = tabulated(TIMESTEPS, rows, [])
    plan.layers["time"] = LayerPlan("linear", unquantized_reason=Reason("looked up in the temporal table"))
    return plan


def mixed(model: Denoiser) -> QuantPlan:
    plan = denoiser_plan(model, weight_bits=4)
    plan.layers["up"].activation, plan.layers["up"].unquantized_reason = None, Reason("weight only")
    plan.layers["down"].activation.bits = 16
    plan.layers["conv_out"] = LayerPlan("conv2d", unquantized_reason=Reason("it makes the image"))
    return plan


def with_tokens(model: Denoiser) -> QuantPlan:
    plan = denoiser_plan(model)
    rows = model.conv_in(torch.zeros(1, 4, 8, 8)).flatten(2).transpose(1, 2)[0, :1]
    known = OutlierRows((0,), rows, torch.full((1, 32), 3.0))
    plan.outlier_rows = {"up": known}
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
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


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


def test_executions_of_a_copy_are_its_own():
    model = quantized()
    clone = copy.deepcopy(model)
    config = checkpoint_config.checkpoint_config_of(clone)
    assert config == checkpoint_config.checkpoint_config_of(model)
    assert config is not checkpoint_config.checkpoint_config_of(model)
