from __future__ import annotations

import torch
from torch import nn

from dq_plugins.passes.binarization import moving_average


def test_the_average_follows_the_formula_with_its_warm_up():
    model = nn.Linear(1, 1, bias=False)
    average, expected = moving_average(model, decay=0.5), 1.0  # the first value is copied
    for step, value in enumerate((1.0, 2.0, -3.0, 5.0, 7.0, 1.0, 2.0, 9.0, -4.0, 3.0), start=1):
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.module.weight.item(), expected)
