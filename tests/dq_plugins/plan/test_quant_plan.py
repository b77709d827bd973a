from __future__ import annotations

import pytest

from dq_plugins.errors import PlanError
from dq_plugins.plan import QuantPlan
from dq_plugins.plan.diff import diff_plans
from dq_plugins.testing.denoiser import TinyDenoiser
from dq_plugins.testing.plans import handmade_plan
from dq_plugins.timesteps import Schedule, TimestepGroups


def planned(*timesteps, groups=None):
    plan = handmade_plan(TinyDenoiser(), groups=groups)
    plan.sampling = Schedule(timesteps) if timesteps else None
    return plan


def test_sampling_timesteps_survive_a_round_trip_and_are_part_of_the_hash(tmp_path):
    plan = planned(900.0, 500.0, 100.0)
    again = QuantPlan.load(plan.save(tmp_path / "plan"))
    assert again == plan
    assert again.sampling == Schedule((900.0, 500.0, 100.0))
    assert again.hash != planned().hash


def test_visited_is_what_the_plan_chose_or_what_was_recorded():
    assert planned(900.0, 100.0).visited.timesteps == (900.0, 100.0)
    assert planned().visited == planned().schedule


def test_a_difference_in_sampling_is_named():
    (found,) = diff_plans(planned(900.0, 100.0), planned())
    assert found.where == "sampling"
    assert "900.0" in found.left
    assert found.right == "-"


@pytest.mark.parametrize("timesteps", [(100.0, 900.0), (900.0, 900.0)])
def test_sampling_descends(timesteps):
    with pytest.raises(PlanError, match="descending"):
        planned(*timesteps).validate()


def test_sampling_stays_where_the_quantizers_were_calibrated():
    groups = TimestepGroups((500.0,), 50.0, 950.0)
    planned(900.0, 100.0, groups=groups).validate()
    with pytest.raises(PlanError, match="calibrated from 50 to 950"):
        planned(990.0, 100.0, groups=groups).validate()
