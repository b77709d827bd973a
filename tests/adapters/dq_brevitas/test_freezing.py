from __future__ import annotations

import pytest
import torch
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector
from dq_brevitas import attach_timesteps, freeze_timestep_group, quantizers
from dq_brevitas.proxy import timestep_proxies

from dq_plugins.errors import TimestepError
from dq_plugins.testing.denoiser import TIMESTEPS, TinyDenoiser
from dq_plugins.timesteps import Schedule, TimestepGroups, context_of

PER_TIMESTEP = TimestepGroups.one_per_timestep(TIMESTEPS)


@pytest.mark.parametrize(
    "name", ["Int8ActPerTimestepFloat", "ShiftedUint8ActPerTimestepFloat", "ShiftedUint8ActPerTimestepFixedPoint"]
)
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
