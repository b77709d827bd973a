from __future__ import annotations

import pytest
from dq_brevitas import attach_timesteps, evenly_spaced_groups
from dq_brevitas.proxy import timestep_proxies
from dq_brevitas.quantizers import Int8ActPerTimestepFloat

from dq_plugins.errors import TimestepError
from dq_plugins.testing.denoiser import TIMESTEPS, TinyDenoiser
from dq_plugins.timesteps import Schedule, TimestepGroups, argument_of, context_of


def test_a_number_of_groups_divides_the_usual_range_evenly():
    assert evenly_spaced_groups(4).edges == (250.0, 500.0, 750.0)
    with pytest.raises(TimestepError, match="at least 1"):
        evenly_spaced_groups(0)


def test_the_timestep_argument_is_found_and_a_schedule_adds_the_finite_set(quantize):
    model = attach_timesteps(quantize(Int8ActPerTimestepFloat), 4, schedule=Schedule(TIMESTEPS))
    assert argument_of(model) == "timestep"
    assert {name: len(groups) for name, groups in context_of(model).groups.items()} == {"default": 4, "schedule": 5}


def test_a_model_without_timestep_quantizers_is_refused():
    with pytest.raises(TimestepError, match="convert_to_timestep"):
        attach_timesteps(TinyDenoiser(), 4)


def test_same_groups_again_keep_the_ranges_and_other_groups_start_again(quantize, calibrate):
    model = calibrate(attach_timesteps(quantize(Int8ActPerTimestepFloat), 4))
    proxy = timestep_proxies(model)["first.input_quant"]
    before = proxy.scale_table().clone()
    attach_timesteps(model, 4, out_of_range="nearest")
    assert proxy.scale_table().equal(before)
    assert proxy.tensor_quantizer.scaling_impl.context is context_of(model)
    attach_timesteps(model, 3)
    assert proxy.scale_table().numel() == 3
    assert proxy.tensor_quantizer.scaling_impl.collecting


def test_out_of_range_timesteps_are_refused(quantize, calibrate, calls):
    model = attach_timesteps(quantize(Int8ActPerTimestepFloat), TimestepGroups((500.0,), low=0, high=950))
    calibrate(model)
    with pytest.raises(TimestepError, match="outside"):
        model(**{**calls[0], "timestep": 999})
