from __future__ import annotations

import copy

import pytest
import torch
from brevitas.quant import Int8ActPerTensorFloat, Int8BiasPerTensorFloatInternalScaling, Int32Bias
from dq_brevitas import attach_timesteps
from dq_brevitas.proxy import timestep_proxies
from dq_brevitas.quantizers import Int8ActPerTimestepFloat, ShiftedUint8ActPerTimestepFloat

from dq_plugins.errors import TimestepError
from dq_plugins.testing.denoiser import TIMESTEPS
from dq_plugins.timesteps import TimestepGroups, context_of

PER_TIMESTEP = TimestepGroups.one_per_timestep(TIMESTEPS)


@pytest.fixture
def grouped(quantize, calibrate):
    return calibrate(attach_timesteps(quantize(ShiftedUint8ActPerTimestepFloat), PER_TIMESTEP))


@pytest.fixture
def fresh(quantize):
    return attach_timesteps(quantize(ShiftedUint8ActPerTimestepFloat), PER_TIMESTEP).eval()


def test_state_dict_round_trip_is_exact_and_strict(grouped, fresh, calls):
    fresh.load_state_dict(grouped.state_dict(), strict=True)
    assert all(torch.equal(grouped(**call), fresh(**call)) for call in calls)
    assert fresh.state_dict()[
        "first.input_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value"
    ].shape == (5,)


def test_a_stock_checkpoint_fills_every_group(quantize, calibrate, calls):
    stock = calibrate(quantize(Int8ActPerTensorFloat))
    grouped = attach_timesteps(quantize(Int8ActPerTimestepFloat), PER_TIMESTEP)
    grouped.load_state_dict(stock.state_dict(), strict=True)
    assert all(torch.equal(stock(**call), grouped(**call)) for call in calls)


def test_an_uncalibrated_model_saves_no_ranges_and_a_loaded_one_is_calibrated(fresh, grouped):
    assert not any(key.endswith("scaling_impl.value") and "input" in key for key in fresh.state_dict())
    fresh.load_state_dict(grouped.state_dict())
    assert not any(p.tensor_quantizer.scaling_impl.collecting for p in timestep_proxies(fresh).values())


def test_deepcopy_routes_by_its_own_context_even_after_loading_a_state(grouped, calls):
    copied = copy.deepcopy(grouped)
    copied.load_state_dict(grouped.state_dict())
    assert context_of(copied) is not context_of(grouped)
    assert {id(p.timestep_context) for p in timestep_proxies(copied).values()} == {id(context_of(copied))}
    with context_of(grouped).select(TIMESTEPS[0]):  # the original busy with another timestep must not matter
        assert all(torch.equal(grouped(**call), copied(**call)) for call in calls)


def test_compiled_without_graph_break_or_recompilation_from_step_to_step(grouped, calls):
    from dq_brevitas import inference_mode

    expected = [grouped(**call) for call in calls]
    with torch.no_grad(), inference_mode(grouped):
        grouped(**calls[0])
        compiled = torch.compile(grouped, backend="eager", fullgraph=True)
        torch._dynamo.utils.counters.clear()
        found = [compiled(**call) for call in calls]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


def test_without_groups_it_refuses_to_run_and_names_the_cure(quantize, calls):
    with pytest.raises(TimestepError, match="attach_timesteps"):
        quantize(Int8ActPerTimestepFloat)(**calls[0])


def test_a_single_scale_for_all_timesteps_is_refused(grouped, quantize, calibrate):
    proxy = timestep_proxies(grouped)["first.input_quant"]
    for ask in (proxy.scale, proxy.zero_point):
        with pytest.raises(TimestepError, match=r"freeze_timestep_group"):
            ask()
    single = calibrate(attach_timesteps(quantize(Int8ActPerTimestepFloat), 1))
    assert timestep_proxies(single)["first.input_quant"].scale().dim() == 0


def test_bias_quantized_with_the_input_scale_works_per_batch_and_is_refused_per_sample(quantize, calibrate, calls):
    model = calibrate(attach_timesteps(quantize(Int8ActPerTimestepFloat, bias_quant=Int32Bias), PER_TIMESTEP))
    model(**calls[0])
    batch = {key: torch.cat([calls[0][key][:1], calls[3][key][:1]]) for key in calls[0]}
    with pytest.raises(TimestepError, match="bias_quant=None"):
        model(**batch)


def test_unknown_groups_are_refused(quantize):
    model = quantize(Int8ActPerTimestepFloat.let(timestep_groups="elsewhere"))
    with pytest.raises(TimestepError, match="'elsewhere'"):
        attach_timesteps(model, 4)


def test_a_bias_with_a_scale_of_its_own_works_per_sample(quantize, calibrate, calls):
    bias = Int8BiasPerTensorFloatInternalScaling
    model = calibrate(attach_timesteps(quantize(Int8ActPerTimestepFloat, bias_quant=bias), PER_TIMESTEP))
    batch = {key: torch.cat([calls[0][key][:1], calls[3][key][:1]]) for key in calls[0]}
    torch.testing.assert_close(model(**batch)[:1], model(**{k: v[:1] for k, v in calls[0].items()}), rtol=0, atol=1e-4)
