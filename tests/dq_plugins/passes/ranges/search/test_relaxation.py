import math

import pytest
import torch

from dq_plugins.passes.ranges.search.relaxation import Relaxation, entropy, start_logits


def test_entropy_of_an_even_choice_is_the_logarithm_and_of_a_decision_nothing() -> None:
    weights = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    assert entropy(weights).tolist() == pytest.approx([math.log(4), 0.0])


def test_a_weight_that_underflows_has_a_finite_gradient() -> None:
    logits = torch.tensor([0.0, -500.0], requires_grad=True)
    entropy(torch.softmax(logits, 0)).backward()
    assert torch.isfinite(logits.grad).all()


def test_ranges_are_those_it_started_from_and_an_end_at_zero_stays_negligible() -> None:
    low, high = torch.tensor([[-1.0, 0.0]]), torch.tensor([[3.0, 2.0]])
    found_low, found_high = Relaxation(torch.zeros(1, 4, 2), low, high).ranges()
    assert torch.allclose(found_high, high)
    assert found_low[0, 0].item() == pytest.approx(-1.0)
    assert -0.003 < found_low[0, 1].item() <= 0


def test_a_start_leads_by_distance_and_scratch_is_even() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([[0, 2]])
    led = start_logits((1, 2, 3), labels, generator)
    assert torch.allclose(led[0], torch.tensor([[0.0, -2.0, -4.0], [-4.0, -2.0, 0.0]]), atol=0.1)
    even = start_logits((1, 2, 3), None, generator)
    assert 0 < even.abs().max() < 0.1


def test_weights_of_some_timesteps_are_rows_of_all() -> None:
    relaxation = Relaxation(torch.randn(2, 5, 3), -torch.ones(2, 3), torch.ones(2, 3))
    assert torch.equal(relaxation.weights(0.7, [4, 1]), relaxation.weights(0.7)[:, [4, 1]])
