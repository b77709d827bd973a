import pytest
import torch
from planted_groups import BITS, planted, points_loss

from dq_plugins.passes.ranges.search.points import PointsLoss, representative
from dq_plugins.passes.ranges.search.relaxation import Relaxation, spread


def test_few_values_stand_for_many() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).sort().values
    few, weights = representative(values, torch.ones(5000))
    assert len(few) == 128
    assert weights.sum().item() == pytest.approx(1)
    assert (few * weights).sum().item() == pytest.approx(values.mean().item(), abs=1e-4)
    assert (few.square() * weights).sum().item() == pytest.approx(values.square().mean().item(), rel=0.01)
    held = few[weights > 0]
    assert held.max().item() == pytest.approx(values.max().item(), rel=0.02)
    assert held.min().item() == pytest.approx(values.min().item(), rel=0.02)


def test_one_value_stands_for_itself() -> None:
    few, weights = representative(torch.tensor([2.0]), torch.tensor([7.0]))
    assert (few[0].item(), weights[0].item(), weights[1:].sum().item()) == (2.0, 1.0, 0.0)


def test_timesteps_without_values_are_not_seen() -> None:
    values, _ = planted(0)
    weights = torch.full_like(values, 1 / values.shape[-1])
    weights[:, 3:] = 0
    assert PointsLoss(values, weights, [BITS] * 2, symmetric=False).timesteps(0) == [0, 1, 2]


def test_layers_count_alike_whatever_their_scale() -> None:
    values, _ = planted(0)
    whole = [values.amin((1, 2))[:, None], values.amax((1, 2))[:, None]]
    scaled = torch.tensor([1.0, 1e3])
    one = torch.ones(1, values.shape[1], 1)
    small = points_loss(values).loss(0, one, Relaxation(torch.zeros(1, 1, 1), *whole))
    large = points_loss(values * scaled.reshape(2, 1, 1)).loss(
        0, one, Relaxation(torch.zeros(1, 1, 1), *(end * scaled[:, None] for end in whole))
    )
    assert small.item() == pytest.approx(large.item(), rel=1e-4)


def test_a_start_from_scratch_spreads_over_layers_that_grow_and_layers_that_shrink() -> None:
    size = torch.logspace(-1, 1, 9)
    width = torch.stack([size, size.flip(0)])
    low, high = spread(-width, width, 3)
    assert torch.equal(low, -high)
    assert sorted(high[0].tolist()) == pytest.approx([0.1, 1.0, 10.0], rel=1e-3)
    assert (high[0] * high[1]).tolist() == pytest.approx([1.0] * 3, rel=1e-3)
