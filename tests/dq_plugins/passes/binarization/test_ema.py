from __future__ import annotations

import torch
from torch import nn

from dq_plugins.passes.binarization import MovingAverage


def test_the_average_follows_the_formula_with_its_warm_up():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average, expected = MovingAverage(model, decay=0.5), 0.0
    for step, value in enumerate((1.0, 2.0, -3.0, 5.0), start=1):
        nn.init.constant_(model.weight, value)
        average.update(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(float(average.average["weight"]), expected)


def test_applied_swaps_and_restores():
    model = nn.Linear(2, 2)
    average = MovingAverage(model)
    start = model.weight.detach().clone()
    nn.init.constant_(model.weight, 7.0)
    with average.applied(model):
        assert torch.equal(model.weight, start)
    assert (model.weight == 7).all()


def test_state_round_trip():
    model = nn.Linear(2, 2)
    average = MovingAverage(model)
    average.update(model)
    other = MovingAverage(nn.Linear(2, 2))
    other.load_state_dict(average.state_dict())
    assert other.steps == 1
    assert torch.equal(other.average["weight"], average.average["weight"])
