from __future__ import annotations

import pytest
import torch
from brevitas import quant as stock
from brevitas.inject.enum import StatsOp
from dq_brevitas import attach_timesteps, quantizers
from dq_brevitas.proxy import timestep_proxies

from dq_plugins.testing.denoiser import TIMESTEPS, TinyDenoiser
from dq_plugins.timesteps import Schedule, TimestepGroups

PAIRS = [
    ("Int8ActPerTensorFloat", "Int8ActPerTimestepFloat"),
    ("Int8ActPerTensorFloatMSE", "Int8ActPerTimestepFloatMSE"),
    ("Uint8ActPerTensorFloat", "Uint8ActPerTimestepFloat"),
    ("ShiftedUint8ActPerTensorFloat", "ShiftedUint8ActPerTimestepFloat"),
]
PER_TIMESTEP = TimestepGroups.one_per_timestep(TIMESTEPS)


# an MSE search is slow and worth it at few bits, so it runs once
@pytest.mark.parametrize(
    ("stock_name", "ours_name", "bits"), [(s, o, b) for s, o in PAIRS for b in (2, 8) if b == 2 or "MSE" not in s]
)
def test_one_group_equals_the_stock_quantizer_bit_for_bit(stock_name, ours_name, bits, quantize, calibrate, calls):
    plain = calibrate(quantize(getattr(stock, stock_name), input_bit_width=bits))
    ours = attach_timesteps(quantize(getattr(quantizers, ours_name), input_bit_width=bits), 1)
    calibrate(ours)
    for call in calls:
        assert torch.equal(plain(**call), ours(**call))
    assert list(plain.state_dict()) == list(ours.state_dict())


@pytest.mark.parametrize("name", ["Int8ActPerTimestepFloat", "ShiftedUint8ActPerTimestepFloat"])
def test_one_group_trains_as_the_stock_quantizer_through_both_phases(name, quantize, calls):
    stock_name = {a: b for b, a in PAIRS}[name]
    models = [
        quantize(getattr(stock, stock_name).let(collect_stats_steps=3)),
        attach_timesteps(quantize(getattr(quantizers, name).let(collect_stats_steps=3)), 1),
    ]
    states = []
    for model in models:
        optimizer = torch.optim.SGD(model.train().parameters(), 1e-3)
        for call in calls:
            optimizer.zero_grad()
            model(**call).square().mean().backward()
            optimizer.step()
        states.append(model.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value.reshape(-1), states[1][key].reshape(-1)), key


# an unsigned quantizer without a zero point clips the negative half of these inputs, whatever its groups
SIGNED = [ours for _, ours in PAIRS if "Shifted" in ours or (ours.startswith("Int8") and ours.endswith("Float"))]


@pytest.mark.parametrize("name", SIGNED)
def test_groups_have_their_own_ranges_and_lower_the_error(name, quantize, calibrate, calls):
    full = TinyDenoiser()
    one = calibrate(attach_timesteps(quantize(getattr(quantizers, name)), 1))
    grouped = calibrate(attach_timesteps(quantize(getattr(quantizers, name)), PER_TIMESTEP))

    def worst(model):
        ratios = [(model(**c) - full(**c)).square().mean() / full(**c).square().mean() for c in calls]
        return max(ratios)

    table = timestep_proxies(grouped)["first.input_quant"].scale_table()
    assert len(table.unique()) > 1
    assert worst(grouped) < worst(one) / 2


@pytest.mark.parametrize("name", ["Int8ActPerTimestepFloat", "ShiftedUint8ActPerTimestepFloat"])
def test_a_batch_of_many_timesteps_equals_its_single_calls(name, quantize, calibrate, calls):
    model = calibrate(attach_timesteps(quantize(getattr(quantizers, name)), PER_TIMESTEP))
    batch = {key: torch.cat([call[key][:1] for call in calls]) for key in calls[0]}
    single = torch.cat([model(**{key: value[:1] for key, value in call.items()}) for call in calls])
    torch.testing.assert_close(model(**batch), single, rtol=0, atol=2e-5)


def test_calibrating_on_mixed_batches_equals_calibrating_on_single_timesteps(quantize, calibrate, calls):
    from brevitas.graph.calibrate import calibration_mode

    act = quantizers.Int8ActPerTimestepFloat.let(scaling_stats_op=StatsOp.MAX)
    single = calibrate(attach_timesteps(quantize(act), PER_TIMESTEP))
    mixed = attach_timesteps(quantize(act), PER_TIMESTEP)
    batch = {k: torch.cat([c[k] if k != "timestep" else c[k].expand(3) for c in calls]) for k in calls[0]}
    with torch.no_grad(), calibration_mode(mixed):
        mixed(**batch)
    for name, proxy in timestep_proxies(single).items():
        torch.testing.assert_close(proxy.scale_table(), timestep_proxies(mixed)[name].scale_table())


def test_training_reaches_the_groups_of_the_batch_and_no_other(quantize, calibrate, calls):
    model = calibrate(attach_timesteps(quantize(quantizers.ShiftedUint8ActPerTimestepFloat), PER_TIMESTEP)).train()
    batch = {key: torch.cat([calls[0][key][:1], calls[3][key][:1]]) for key in calls[0]}
    model(**batch).square().mean().backward()
    present = {PER_TIMESTEP.of(float(t)) for t in batch["timestep"]}
    for name, proxy in timestep_proxies(model).items():
        gradient = proxy.tensor_quantizer.scaling_impl.value.grad
        absent = [g for g in range(len(PER_TIMESTEP)) if g not in present]
        assert torch.equal(gradient[absent], torch.zeros(len(absent))), name
        if not name.startswith("time_in"):  # whose codes are +-127 for sines, where rounding cancels
            assert bool((gradient[list(present)] != 0).all()), name


@pytest.mark.parametrize("name", ["Int8ActFiniteSetFloat", "ShiftedUint8ActFiniteSetFloat"])
def test_finite_set_ranges_are_exact_for_every_timestep_of_the_schedule(name, quantize, calibrate, calls):
    act = getattr(quantizers, name)
    model = attach_timesteps(quantize(act), 1, schedule=Schedule(TIMESTEPS))
    calibrate(model)
    seen = {}
    for call in calls:
        hook = TinyDenoiser()
        hook.modulation.register_forward_pre_hook(lambda m, a, t=float(call["timestep"]): seen.update({t: a[0]}))
        hook(**call)
    proxy = timestep_proxies(model)["modulation.input_quant"]
    for t, x in seen.items():
        group = PER_TIMESTEP.of(t)
        width = x.max() - x.min().clamp(max=0) if name.startswith("Shifted") else x.abs().max()
        levels = 255 if name.startswith("Shifted") else 128
        torch.testing.assert_close(proxy.scale_table()[group], width / levels, rtol=1e-5, atol=0)


def test_half_precision_stays_half_precision_with_one_timestep_per_sample(quantize, calibrate, calls):
    model = calibrate(attach_timesteps(quantize(quantizers.Int8ActPerTimestepFloat), PER_TIMESTEP))
    layer = model.up.bfloat16()
    context = layer.input_quant.timestep_context
    with context.select(torch.tensor([100.0, 900.0])):
        assert layer(torch.randn(2, 7, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
