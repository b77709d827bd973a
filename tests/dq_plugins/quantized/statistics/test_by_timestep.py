from __future__ import annotations

import pytest
import torch

from dq_plugins.affine import affine_parameters, fake_quantize, integer_range
from dq_plugins.observers import optimal_groups
from dq_plugins.observers.streaming import stream_inputs
from dq_plugins.quantized.statistics import Collector, collect


def inputs_at(denoiser, calib, layer, t):
    seen = []
    for _ in stream_inputs(denoiser, calib, [layer], lambda _, x, t: seen.append(x.clone()), timesteps=[t]):
        pass
    return torch.cat(seen)


def test_ends_counts_and_power_are_exact(denoiser, calib):
    found = collect(denoiser, calib, ["moves", "still"])
    assert found.timesteps == (100.0, 300.0, 500.0, 700.0, 900.0)
    for i, t in enumerate(found.timesteps):
        x = inputs_at(denoiser, calib, "moves", t)
        assert int(found.count("moves")[i]) == x.numel() == 2 * 2 * 3 * 64
        assert (float(found.low("moves")[i]), float(found.high("moves")[i])) == (float(x.min()), float(x.max()))
        assert float(found.mean_square("moves")[i]) == pytest.approx(float(x.double().square().mean()))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_groups_lower_the_real_error_of_layers_that_move_and_raise_none(denoiser, calib, bits, symmetric):
    layers = ["moves", "still"]
    found = collect(denoiser, calib, layers)
    grouping = optimal_groups(found.error_tables(bits, symmetric=symmetric), found.timesteps)

    def real(layer, count):
        groups, (low, high) = grouping.groups(count), grouping.ranges(count)[layer]
        total = 0.0
        for t in found.timesteps:
            x, g = inputs_at(denoiser, calib, layer, t), groups.of(t)
            scale, zero = affine_parameters(low[g], high[g], bits, symmetric=symmetric)
            total += float((fake_quantize(x, scale, zero, *integer_range(bits)) - x).double().square().mean())
        return total

    assert real("moves", 3) < 0.75 * real("moves", 1)
    assert real("still", 3) == real("still", 1)
    power = float(found.mean_square("moves").sum())
    assert grouping.errors(1)["moves"] * power == pytest.approx(real("moves", 1), rel=0.02)


def test_error_tables_take_a_width_for_each_layer(denoiser, calib):
    found = collect(denoiser, calib, ["moves", "still"])
    mixed = found.error_tables({"moves": 4, "still": 8})
    assert torch.equal(mixed["moves"].error, found.error_table("moves", 4).error)
    assert torch.equal(mixed["still"].error, found.error_table("still", 8).error)


def test_a_timestep_at_which_a_layer_did_not_run_costs_nothing():
    collector = Collector()
    collector.see("a", torch.randn(50, generator=torch.Generator().manual_seed(0)), 900)
    collector.see("b", torch.ones(4), 100)
    found = collector.statistics(["a", "b"])
    table = found.error_table("a", 4)
    assert found.count("a").tolist() == [0, 50]
    assert not table.error[0].any()
    assert table.error[1].all()
    assert table.power == pytest.approx(float(found.mean_square("a")[1]))
