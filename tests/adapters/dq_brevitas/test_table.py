from __future__ import annotations

import pytest
import torch
from brevitas.graph.calibrate import calibration_mode
from dq_brevitas import attach_timesteps, calibration_coverage, restart_calibration
from dq_brevitas.proxy import timestep_proxies
from dq_brevitas.quantizers import Int8ActPerTimestepFloat
from dq_brevitas.scaling import TimestepScaling

from dq_plugins.errors import CalibrationError, DQWarning
from dq_plugins.testing.denoiser import TIMESTEPS
from dq_plugins.timesteps import TimestepContext, TimestepGroups

PER_TIMESTEP = TimestepGroups.one_per_timestep(TIMESTEPS)
CONTEXT = TimestepContext({"g": TimestepGroups((10.0, 20.0))})


def scaling(**changes):
    from brevitas.core.stats import AbsMax

    found = TimestepScaling(CONTEXT, "g", **{"collect_stats_steps": 2, "scaling_stats_impl": AbsMax(), **changes})
    return found.train()


def at(table, t, peak):
    with CONTEXT.select(t):
        return table(torch.tensor([-peak, 0.5 * peak]))


def test_each_group_collects_on_its_own_and_then_learns():
    table = scaling(scaling_stats_momentum=None)
    assert at(table, 5, 1.0) == 1.0  # while collecting, the statistic of this very batch
    assert at(table, 5, 3.0) == 3.0
    assert at(table, 5, 100.0) == 2.0  # finished: the mean of the two, whatever comes
    assert at(table, 15, 7.0) == 7.0
    assert table.collecting
    for _ in range(2):
        at(table, 15, 8.0), at(table, 25, 4.0)
    assert not table.collecting
    torch.testing.assert_close(table.entries().detach(), torch.tensor([2.0, 7.5, 4.0]))


def test_max_reduction_keeps_the_largest_call():
    table = scaling(timestep_reduction="max", collect_stats_steps=10)
    for peak in (1.0, 9.0, 3.0):
        at(table, 5, peak)
    with pytest.warns(DQWarning, match="saw no calibration data"):
        table.init_scale()
    assert float(table.value[0]) == 9.0


def test_unknown_reduction_is_refused():
    with pytest.raises(CalibrationError, match="'median'"):
        scaling(timestep_reduction="median")


def test_unseen_groups_take_the_nearest_range_and_say_so():
    table = scaling()
    at(table, 5, 2.0)
    with pytest.warns(UserWarning, match=r"groups \[1, 2\] of 3"):
        table.init_scale()
    assert table.entries().tolist() == [2.0, 2.0, 2.0]


def test_calibration_without_a_single_call_leaves_the_table_uncalibrated():
    table = scaling()
    table.init_scale()
    assert table.collecting
    assert "value" not in table.state_dict()


def test_a_table_without_statistic_says_how_to_get_one():
    table = scaling(scaling_stats_impl=None)
    with pytest.raises(CalibrationError, match="scaling_stats_op"):
        at(table, 5, 1.0)


def test_a_known_table_of_the_wrong_length_is_refused():
    with pytest.raises(CalibrationError, match="are 3"):
        scaling(scaling_table_init=torch.ones(2))


def test_restarted_calibration_replaces_visited_groups_and_keeps_the_others(quantize, calibrate, calls):
    model = calibrate(attach_timesteps(quantize(Int8ActPerTimestepFloat), PER_TIMESTEP))
    table = timestep_proxies(model)["first.input_quant"].scale_table
    before = table().detach().clone()
    with torch.no_grad(), calibration_mode(model):  # already calibrated: changes nothing
        model(**{**calls[0], "sample": calls[0]["sample"] * 5})
    assert torch.equal(table(), before)
    restart_calibration(model)
    assert torch.equal(model.eval() and table(), before)
    with pytest.warns(UserWarning, match="previous ranges"), torch.no_grad(), calibration_mode(model):
        model(**{**calls[0], "sample": calls[0]["sample"] * 5})
    group = PER_TIMESTEP.of(float(calls[0]["timestep"]))
    torch.testing.assert_close(table()[group], before[group] * 5)
    others = [g for g in range(5) if g != group]
    assert torch.equal(table()[others], before[others])
    assert calibration_coverage(model)["first.input_quant"][group] == 1
