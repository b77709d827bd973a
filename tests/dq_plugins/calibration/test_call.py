from __future__ import annotations

import pytest
import torch

from dq_plugins.calibration import Call, first_tensor
from dq_plugins.calibration.call import timestep_tensor
from dq_plugins.errors import CalibrationError, TimestepError


def test_the_first_tensor_of_nested_outputs():
    x = torch.ones(1)
    assert first_tensor((x, 3)) is x
    assert first_tensor({"sample": [None, x]}) is x
    for nothing in ((), {"sample": 3}, None):
        with pytest.raises(CalibrationError, match="without a tensor in it"):
            first_tensor(nothing)


def guided_call(index: int = 0, **further) -> Call:
    sample = torch.arange(8.0)[:, None].expand(8, 3)
    return Call(index, torch.tensor(5), {"sample": sample, "scale": torch.ones(1), **further}, sample)


def test_some_samples_of_a_guided_batch_are_of_both_halves():
    some = guided_call().some(4)
    assert some.output[:, 0].tolist() == [0, 2, 4, 6]
    assert torch.equal(some.kwargs["sample"], some.output)
    assert some.kwargs["scale"].shape == (1,)
    assert some.timestep.dim() == 0


@pytest.mark.parametrize("every", [1, 4, 8, 25])
def test_several_calls_see_all_samples(every):
    seen = [guided_call(index).some(2).output[:, 0].tolist() for index in range(0, 12 * every, every)]
    assert all(high - low == 4 for low, high in seen)  # one of each half
    assert {sample for pair in seen for sample in pair} == set(range(8))


def test_a_call_stays_whole_where_its_samples_cannot_be_told_apart():
    for call in (guided_call(tokens=torch.ones(5, 3)), guided_call(number=torch.ones(3, 8)), guided_call().some(3)):
        assert call.some(3) is call
    assert len(guided_call(number=torch.tensor(2)).some(3).output) == 3


@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), float("inf")])
def test_timesteps_that_no_number_holds_are_refused(value):
    with pytest.raises(TimestepError, match="not finite"):
        timestep_tensor(value, "t")


@pytest.mark.parametrize("value", [5, 2**63 - 1, 10**30, 0.5])
def test_timesteps_of_any_size_are_read(value):
    assert float(timestep_tensor(value, "t")) == float(value)


def test_an_image_has_two_rows_where_both_halves_of_the_batch_are_alike():
    half = torch.arange(6.0).reshape(2, 3)
    for sample, rows in ((torch.cat([half, half]), 2), (torch.cat([half, -half]), 1), (half[:1], 1)):
        assert Call(0, torch.tensor(5), {"sample": sample}, sample).branches("sample") == rows
