from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from dq_plugins.errors import DQError
from dq_plugins.quantized.binarizers import (
    BinaryBasis,
    EvolvableBasis,
    evolution_penalty,
    evolve,
    mean_magnitude,
    second_scale_mean,
)
from dq_plugins.quantized.straight_through import sign

GAUSSIAN = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0)) * 0.05


def relative_error(binarizer, weight):
    return float((binarizer(weight) - weight).square().sum().detach() / weight.square().sum())


def test_one_basis_leaves_the_theoretical_error_of_gaussian_weights():
    assert relative_error(BinaryBasis(GAUSSIAN), GAUSSIAN) == pytest.approx(1 - 2 / math.pi, abs=2e-3)


def test_two_bases_start_at_the_error_of_the_residual_scales():
    # E|r| of the residual of a half normal at its mean c is 4 (phi(c) - c Q(c))
    c = math.sqrt(2 / math.pi)
    phi, tail = math.exp(-c * c / 2) / math.sqrt(2 * math.pi), 0.5 * math.erfc(c / math.sqrt(2))
    expected = 1 - 2 / math.pi - (4 * (phi - c * tail)) ** 2
    assert expected == pytest.approx(0.1305, abs=1e-4)
    assert relative_error(EvolvableBasis(GAUSSIAN), GAUSSIAN) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("shape", [(8, 5), (8, 3, 3, 3), (8, 4, 3)])
def test_after_the_transition_the_forward_is_scaled_signs_bit_for_bit(shape):
    weight = torch.randn(shape)
    basis = EvolvableBasis(weight)
    with torch.no_grad():
        basis.scale.mul_(torch.rand(8) + 0.5)
    assert not basis.evolved
    evolve(basis)
    assert basis.evolved
    expected = basis.scale.detach().reshape(-1, *[1] * (len(shape) - 1)) * sign(weight)
    assert basis(weight).detach().numpy().tobytes() == expected.numpy().tobytes()


def test_the_stage_travels_in_the_state_dict_and_in_copies():
    basis = EvolvableBasis(torch.randn(4, 6))
    evolve(basis)
    other = EvolvableBasis(torch.randn(4, 6))
    other.load_state_dict(basis.state_dict())
    assert other.evolved
    assert copy.deepcopy(basis).evolved


def test_after_the_transition_the_second_scale_keeps_a_gradient_of_zero():
    weight = torch.randn(4, 6, requires_grad=True)
    basis = EvolvableBasis(weight)
    evolve(basis)
    (basis(weight) * torch.randn(4, 6)).sum().backward()
    assert basis.second_scale.grad is not None
    assert not basis.second_scale.grad.any()


def parameter_gradient(gradient, weight, upstream):
    basis = EvolvableBasis(weight, scale_gradient=gradient)
    (basis(weight) * upstream).sum().backward()
    return basis, basis.scale.grad, basis.second_scale.grad


def test_gradients_are_the_documented_formulas():
    torch.manual_seed(0)
    weight, upstream = torch.randn(3, 400), torch.randn(3, 400)
    basis, autograd, second = parameter_gradient("autograd", weight, upstream)
    _, printed, second_printed = parameter_gradient("printed", weight, upstream)
    s1, s2 = basis.scale.detach()[:, None], basis.second_scale.detach()[:, None]
    b1 = sign(weight)
    inside = ((weight - s1 * b1).abs() < 1).float()
    torch.testing.assert_close(autograd, (upstream * b1 * (1 - s2 * inside)).sum(1))
    torch.testing.assert_close(printed, (upstream * b1 * (1 - s2 * b1 * inside)).sum(1))
    expected_second = (upstream * sign(weight - s1 * b1)).sum(1)
    torch.testing.assert_close(second, expected_second)
    torch.testing.assert_close(second_printed, expected_second)


def test_both_gradients_have_the_same_forward_and_weight_gradient():
    weight, upstream = torch.randn(3, 50), torch.randn(3, 50)
    results = []
    for gradient in ("autograd", "printed"):
        w = weight.clone().requires_grad_(True)
        out = EvolvableBasis(weight, scale_gradient=gradient)(w)
        (out * upstream).sum().backward()
        results.append((out.detach(), w.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_finite_differences_side_with_autograd_when_the_upstream_gradient_has_a_mean():
    """L(s1) = mean (w_EBB - target)^2 with targets off centre: its slope is known by differences."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 100_000, generator=generator, dtype=torch.double) * 0.5
    wrong_by = {"autograd": [], "printed": []}
    for offset in (-1.0, -0.5, 0.5, 1.0):
        target = weight + offset

        def loss(basis, target=target):
            return (basis(weight) - target).square().mean()

        for gradient, errors in wrong_by.items():
            basis = EvolvableBasis(weight, scale_gradient=gradient)
            (found,) = torch.autograd.grad(loss(basis), basis.scale)
            with torch.no_grad():
                h = 0.01
                basis.scale.add_(h)
                above = loss(basis)
                basis.scale.sub_(2 * h)
                slope = (above - loss(basis)) / (2 * h)
            errors.append(abs(float(found - slope)))
    assert max(wrong_by["autograd"]) < 0.1
    assert min(wrong_by["printed"]) > 0.2


def train_with_penalty(tau, steps=300):
    """A binarized layer learns the outputs of its full-precision self, where a second basis does help."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 16, bias=False)
    nn.init.normal_(layer.weight, std=2e-3)
    layer.basis = EvolvableBasis(layer.weight)
    x = torch.randn(256, 32)
    target = layer(x).detach()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-5)
    start, means = second_scale_mean(layer), []

    def loss():
        return (x @ layer.basis(layer.weight).t() - target).square().mean()

    for _ in range(steps):
        optimizer.zero_grad()
        total = loss() + (evolution_penalty(layer, tau) if tau else 0)
        total.backward()
        optimizer.step()
        means.append(second_scale_mean(layer) / start)
    before = float(loss().detach())
    evolve(layer)
    return means, float(loss().detach()) / before


def test_the_regulariser_of_the_paper_shrinks_the_second_scale_and_the_jump_at_the_transition():
    with_penalty, jump = train_with_penalty(tau=9e-2)
    without, jump_without = train_with_penalty(tau=0.0)
    assert with_penalty[-1] < 0.05
    assert all(later <= earlier + 0.02 for earlier, later in pairwise(with_penalty))
    assert min(without) > 0.5
    assert jump < 1.1
    assert jump_without > 1.3


def test_penalty_is_the_mean_over_layers_and_zero_after_the_transition():
    model = nn.ModuleList([EvolvableBasis(torch.randn(4, 9)), EvolvableBasis(torch.randn(2, 5))])
    expected = 0.09 * (model[0].second_scale.mean() + model[1].second_scale.mean()) / 2
    torch.testing.assert_close(evolution_penalty(model), expected)
    assert evolve(model) == 2
    assert evolve(model) == 0
    assert float(evolution_penalty(model).detach()) == 0


def test_nothing_to_penalise_is_an_error():
    with pytest.raises(DQError, match="no evolvable-basis"):
        evolution_penalty(nn.Linear(2, 2))


def test_mean_magnitude_needs_output_channels():
    with pytest.raises(DQError, match=r"\[O, \.\.\.\]"):
        mean_magnitude(torch.randn(3))


def test_wrong_gradient_name_is_an_error():
    with pytest.raises(DQError, match="scale_gradient"):
        EvolvableBasis(torch.randn(2, 2), scale_gradient="exact")
