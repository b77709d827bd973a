from __future__ import annotations

import pytest
import torch

from dq_plugins.calibration import first_tensor
from dq_plugins.errors import CalibrationError


def test_the_first_tensor_of_nested_outputs():
    x = torch.ones(1)
    assert first_tensor((x, 3)) is x
    assert first_tensor({"sample": [None, x]}) is x
    for nothing in ((), {"sample": 3}, None):
        with pytest.raises(CalibrationError, match="without a tensor in it"):
            first_tensor(nothing)
