from __future__ import annotations

import gc
import weakref

import pytest
import torch
from artifacts import edit_file, edit_record
from brevitas import quant as stock
from brevitas.graph.calibrate import bias_correction_mode
from brevitas.graph.gptq import gptq_mode
from dq_brevitas import BrevitasAdapter, attach_timesteps, load, quantizers, save
from dq_brevitas.proxy import timestep_proxies

from dq_plugins.errors import DQError
from dq_plugins.testing.denoiser import TIMESTEPS, TinyDenoiser
from dq_plugins.testing.plans import handmade_plan
from dq_plugins.timesteps import TimestepGroups, context_of

GROUPS = TimestepGroups.one_per_timestep(TIMESTEPS, low=50.0)
ACT = quantizers.ShiftedUint8ActPerTimestepFloat


@pytest.fixture
def saved(quantize, calibrate, tmp_path):
    model = calibrate(attach_timesteps(quantize(ACT, input_bit_width=5), GROUPS, out_of_range="nearest"))
    return model, save(model, tmp_path / "model")


def test_a_loaded_model_equals_the_saved_one_groups_and_all(saved, quantize, calls):
    model, folder = saved
    fresh = load(quantize(ACT, input_bit_width=5), folder)
    assert all(torch.equal(model(**call), fresh(**call)) for call in calls)
    assert context_of(fresh).groups == {"default": GROUPS}
    assert context_of(fresh).out_of_range == "nearest"
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors"]


def test_loading_again_and_again_leaves_nothing_behind(saved, quantize):
    _, folder = saved
    fresh = load(quantize(ACT, input_bit_width=5), folder)

    def bases() -> list[int]:
        return [len(proxy.quant_injector.__mro__) for proxy in timestep_proxies(fresh).values()]

    before, context = bases(), weakref.ref(context_of(fresh))
    load(load(fresh, folder), folder)
    assert bases() == before
    gc.collect()
    assert context() is None


def test_a_model_made_from_a_plan_loads_into_the_plan_applied_again(tmp_path, calls):
    plan = handmade_plan(TinyDenoiser())
    model = BrevitasAdapter().apply(TinyDenoiser(), plan)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    fresh = load(BrevitasAdapter().apply(TinyDenoiser(), plan), save(model, tmp_path))
    assert all(torch.equal(model(**call), fresh(**call)) for call in calls)


def test_bias_correction_and_gptq_leave_nothing_that_cannot_be_loaded(quantize, calibrate, calls, tmp_path):
    def build():
        return quantize(ACT, weight_scaling_impl_type="parameter_from_stats")

    model = attach_timesteps(build(), GROUPS)
    model.up.bias = None
    calibrate(model)
    model(**calls[0])
    with torch.no_grad(), gptq_mode(model) as gptq:  # adds float copies of the weights
        for _ in range(gptq.num_layers):
            gptq.model(**calls[0])
            gptq.update()
    with torch.no_grad(), bias_correction_mode(model):
        model(**calls[0])
    fresh = build()
    fresh.up.bias = None
    load(fresh, save(model, tmp_path))
    assert torch.equal(fresh.up.bias, model.up.bias)
    assert all(torch.equal(model(**call), fresh(**call)) for call in calls)
    assert not any("weight_orig" in key for key in fresh.state_dict())


def test_a_stock_model_is_saved_too(quantize, calibrate, calls, tmp_path):
    model = calibrate(quantize(stock.Int8ActPerTensorFloat))
    fresh = load(quantize(stock.Int8ActPerTensorFloat), save(model, tmp_path))
    assert all(torch.equal(model(**call), fresh(**call)) for call in calls)


def test_another_quantization_is_refused_by_layer(saved, quantize):
    _, folder = saved
    with pytest.raises(DQError, match=r"input of layer 'condition' was saved with 5 bits; this model has 8"):
        load(quantize(ACT), folder)
    with pytest.raises(DQError, match=r"'condition' was quantized"):
        load(TinyDenoiser(), folder)
    with pytest.raises(DQError, match="does not fit"):
        load(quantize(quantizers.Int8ActPerTimestepFloat, input_bit_width=5), folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: edit_file(file, hash="0" * 64), "altered"),
        (lambda file: edit_record(file, lambda record: record.update(surprise=1)), "surprise"),
        (lambda file: edit_record(file, lambda record: record["widths"]["up"].update(weight="3")), r"widths\.up"),
        (lambda file: edit_file(file, format_version=99), "format 99"),
        (lambda file: file.write_bytes(file.read_bytes()[:-4]), "truncated"),
        (lambda file: file.unlink(), r"model\.safetensors is missing"),
    ],
)
def test_damage_is_noticed(saved, quantize, damage, message):
    _, folder = saved
    damage(folder / "model.safetensors")
    with pytest.raises(DQError, match=message):
        load(quantize(ACT, input_bit_width=5), folder)
