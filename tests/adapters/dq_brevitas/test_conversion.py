from __future__ import annotations

import pytest
import torch
from brevitas import nn as qnn
from brevitas import quant as stock
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector
from brevitas.quant.scaled_int import Int8ActPerTensorFloatMinMaxInit
from dq_brevitas import attach_timesteps, convert_to_timestep, freeze_timestep_group, quantizers
from dq_brevitas.proxy import TimestepActQuantProxyFromInjector, timestep_proxies
from torch import nn

from dq_plugins.errors import DQError, TimestepError
from dq_plugins.testing.denoiser import TIMESTEPS, TinyDenoiser
from dq_plugins.timesteps import Schedule, TimestepGroups, context_of

PER_TIMESTEP = TimestepGroups.one_per_timestep(TIMESTEPS)
NAMES = ["Int8ActPerTensorFloat", "ShiftedUint8ActPerTensorFloat", "Int8ActPerTensorFixedPoint"]


@pytest.mark.parametrize("name", NAMES)
def test_a_calibrated_model_computes_the_same_until_it_is_recalibrated(name, quantize, calibrate, calls):
    model = calibrate(quantize(getattr(stock, name)))
    before = [model(**call) for call in calls]
    assert convert_to_timestep(model, PER_TIMESTEP) is model
    assert len(timestep_proxies(model)) == 8
    assert all(torch.equal(a, model.eval()(**call)) for a, call in zip(before, calls, strict=True))


@pytest.mark.parametrize("name", NAMES[:2])
def test_recalibrated_it_equals_a_model_built_from_the_injector(name, quantize, calibrate, calls):
    converted = convert_to_timestep(calibrate(quantize(getattr(stock, name))), PER_TIMESTEP)
    injected = getattr(quantizers, name.replace("PerTensor", "PerTimestep"))
    built = attach_timesteps(quantize(injected), PER_TIMESTEP)
    for model in (calibrate(converted), calibrate(built)):
        model.eval()
    assert all(torch.equal(converted(**call), built(**call)) for call in calls)
    assert list(converted.state_dict()) == list(built.state_dict())


def test_without_recalibration_training_goes_on_from_the_ranges_there_are(quantize, calibrate, calls):
    model = calibrate(quantize(stock.Int8ActPerTensorFloat))
    scale = model.first.input_quant.scale().clone()
    convert_to_timestep(model, PER_TIMESTEP, recalibrate=False).train()
    model(**calls[0])
    torch.testing.assert_close(model.first.input_quant.scale_table(), scale.expand(5), rtol=0, atol=0)


def test_an_uncalibrated_model_is_converted_and_then_calibrates(quantize, calibrate):
    model = calibrate(convert_to_timestep(quantize(stock.Int8ActPerTensorFloat), PER_TIMESTEP))
    built = calibrate(attach_timesteps(quantize(quantizers.Int8ActPerTimestepFloat), PER_TIMESTEP))
    found, expected = (m.first.input_quant.scale_table() for m in (model, built))
    assert len(expected.unique()) == 5
    assert torch.equal(found, expected)


def test_a_range_given_as_a_constant_is_kept_for_every_group(quantize, calls):
    act = Int8ActPerTensorFloatMinMaxInit.let(min_val=-4.0, max_val=4.0)
    model = quantize(act)
    before = model(**calls[0])
    convert_to_timestep(model, PER_TIMESTEP, recalibrate=False)
    assert torch.equal(model(**calls[0]), before)


def test_a_shared_quantizer_stays_shared():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = qnn.QuantLinear(4, 4, bias=True, input_quant=stock.Int8ActPerTensorFloat)
            self.b = qnn.QuantLinear(4, 4, bias=True, input_quant=self.a.input_quant)

        def forward(self, x, t):
            return self.a(x) + self.b(x)

    model = convert_to_timestep(Pair(), 4)
    assert isinstance(model.a.input_quant, TimestepActQuantProxyFromInjector)
    assert model.a.input_quant is model.b.input_quant


def test_a_dynamic_quantizer_is_refused_by_name_and_can_be_skipped(quantize):
    from brevitas.quant.experimental.mx_quant_ocp import MXInt8Act

    model = quantize(stock.Int8ActPerTensorFloat)
    model.up = qnn.QuantLinear(16, 32, bias=True, input_quant=MXInt8Act)
    with pytest.raises(DQError, match=r"'up.input_quant'"):
        convert_to_timestep(model, 4)
    assert len(timestep_proxies(model)) == 0, "a refused model must be intact"
    assert len(timestep_proxies(convert_to_timestep(model, 4, skip=["up.input_quant"]))) == 7
    with pytest.raises(DQError, match="'nowhere'"):
        convert_to_timestep(model, 4, skip=["nowhere"])


@pytest.mark.parametrize("name", ["Int8ActPerTimestepFloat", "ShiftedUint8ActPerTimestepFloat"])
def test_each_frozen_group_equals_the_model_at_its_timesteps(name, quantize, calibrate, calls):
    model = calibrate(attach_timesteps(quantize(getattr(quantizers, name)), PER_TIMESTEP))
    for call in calls:
        frozen = freeze_timestep_group(model, PER_TIMESTEP.of(float(call["timestep"])))
        assert context_of(frozen) is None
        assert type(frozen.first.input_quant) is ActQuantProxyFromInjector
        assert torch.equal(frozen(**call), model(**call))
    assert len(timestep_proxies(model)) == 8, "the model itself is not changed"


def test_a_frozen_model_goes_through_the_stock_export_that_knows_one_scale(quantize, calibrate, calls):
    from brevitas.export import export_torch_qcdq

    model = calibrate(attach_timesteps(quantize(quantizers.Int8ActPerTimestepFloat), PER_TIMESTEP))
    call = calls[1]
    frozen = freeze_timestep_group(model, PER_TIMESTEP.of(float(call["timestep"])))
    traced = export_torch_qcdq(frozen, args=tuple(call.values()))
    torch.testing.assert_close(traced(*call.values()), model(**call), rtol=0, atol=1e-5)


def test_several_sets_need_one_group_each(quantize, calibrate):
    model = quantize(quantizers.Int8ActPerTimestepFloat)
    finite = quantize(quantizers.Int8ActFiniteSetFloat)
    model.modulation = finite.modulation
    calibrate(attach_timesteps(model, 2, schedule=Schedule(TIMESTEPS)))
    with pytest.raises(TimestepError, match=r"\['default', 'schedule'\]"):
        freeze_timestep_group(model, 0)
    frozen = freeze_timestep_group(model, {"default": 1, "schedule": 3})
    expected = timestep_proxies(model)["modulation.input_quant"].scale_table()[3]
    assert torch.equal(frozen.modulation.input_quant.scale(), expected)


def test_a_group_that_does_not_exist_is_refused(quantize, calibrate):
    model = calibrate(attach_timesteps(quantize(quantizers.Int8ActPerTimestepFloat), 4))
    with pytest.raises(TimestepError, match="0 to 3"):
        freeze_timestep_group(model, 4)
    with pytest.raises(TimestepError, match="attach_timesteps"):
        freeze_timestep_group(TinyDenoiser(), 0)
