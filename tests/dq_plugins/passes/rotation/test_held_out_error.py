from __future__ import annotations

import pytest
import torch
from torch import nn

from dq_plugins.passes.rotation.held_out_error import OUTPUTS, InputRows, fake_inputs, held_out_error
from dq_plugins.plan import Targets

TARGETS = Targets(4, 6)


def rows(shape: tuple[int, ...], seed: int) -> InputRows:
    values = torch.randn(64, *shape, generator=torch.Generator().manual_seed(seed))
    return InputRows(values, torch.arange(64) % 2)


def test_known_inputs_are_taken_as_they_are() -> None:
    layer, seen, held_out = nn.Linear(24, 16).requires_grad_(False), rows((24,), 0), rows((24,), 1)
    inputs = fake_inputs(layer, seen, held_out, None, TARGETS)
    found = held_out_error([layer], seen, held_out, None, TARGETS)
    assert held_out_error([layer], seen, held_out, None, TARGETS, inputs) == found
    exact = held_out_error([layer], seen, held_out, None, TARGETS, held_out.values)
    assert 0 < exact < found


@pytest.mark.parametrize("layer", [nn.Linear(24, 9 * OUTPUTS + 7), nn.Conv2d(8, 9 * OUTPUTS, 3)])
def test_some_outputs_tell_what_all_do(layer: nn.Module, monkeypatch) -> None:
    layer.requires_grad_(False)
    shape = layer.weight.shape[1:]
    seen, held_out = rows(tuple(shape), 0), rows(tuple(shape), 1)
    some = held_out_error([layer], seen, held_out, None, TARGETS)
    monkeypatch.setattr("dq_plugins.passes.rotation.held_out_error.OUTPUTS", 10**9)
    every = held_out_error([layer], seen, held_out, None, TARGETS)
    assert some != every
    assert some == pytest.approx(every, rel=0.05)


def test_all_outputs_count_where_a_layer_has_groups(monkeypatch) -> None:
    layer = nn.Conv2d(4, 4 * OUTPUTS, 3, groups=2).requires_grad_(False)
    seen, held_out = rows((4, 3, 3), 0), rows((4, 3, 3), 1)
    some = held_out_error([layer], seen, held_out, None, TARGETS)
    monkeypatch.setattr("dq_plugins.passes.rotation.held_out_error.OUTPUTS", 10**9)
    assert held_out_error([layer], seen, held_out, None, TARGETS) == some
