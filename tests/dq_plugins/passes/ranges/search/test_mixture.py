import pytest
import torch

from dq_plugins.affine import affine_parameters, fake_quantize, integer_range
from dq_plugins.passes.ranges.search.mixture import mixture

LOW, HIGH = torch.tensor([-1.0, -0.3, -4.0]), torch.tensor([2.0, 0.5, 3.0])


def x_of(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_group_is_the_quantizer_that_executes_bit_for_bit(symmetric: bool) -> None:
    for g in range(3):
        scale, zero_point = affine_parameters(LOW[g], HIGH[g], 5, symmetric=symmetric)
        expected = fake_quantize(x_of(), scale, zero_point, *integer_range(5))
        one_hot = torch.nn.functional.one_hot(torch.tensor(g), 3).float()
        assert torch.equal(mixture(x_of(), one_hot, LOW, HIGH, 5, symmetric=symmetric), expected)


def test_gradient_of_the_weights_is_exact() -> None:
    x, weights = x_of(), torch.tensor([0.2, 0.5, 0.3], requires_grad=True)
    mixture(x, weights, LOW, HIGH, 4, symmetric=False).sum().backward()
    versions = [mixture(x, torch.eye(3)[g], LOW, HIGH, 4, symmetric=False).sum() for g in range(3)]
    assert weights.grad == pytest.approx(torch.stack(versions))


def test_clipped_values_move_the_bound_that_clips_them_and_pass_no_gradient_on() -> None:
    x = torch.tensor([-3.0, 0.1, 5.0], requires_grad=True)
    low, high = (t.clone().requires_grad_() for t in (torch.tensor([-1.0]), torch.tensor([1.0])))
    mixture(x, torch.ones(1), low, high, 8, symmetric=False).sum().backward()
    assert x.grad.tolist() == [0, 1, 0]
    assert low.grad.item() == pytest.approx(1, abs=0.01)
    assert high.grad.item() == pytest.approx(1, abs=0.01)


def test_gradient_of_a_bound_agrees_with_finite_differences_on_the_whole() -> None:
    # rounding makes single values jump, so the error over many values is compared
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * 3

    def error(high: torch.Tensor) -> torch.Tensor:
        low = torch.tensor([-2.0])
        return (mixture(x, torch.ones(1), low, high, 6, symmetric=False) - x).square().mean()

    high = torch.tensor([2.0], requires_grad=True)
    error(high).backward()
    numeric = (error(torch.tensor([2.05])) - error(torch.tensor([1.95]))) / 0.1
    assert high.grad.item() == pytest.approx(numeric.item(), rel=0.05)


def test_a_version_with_negligible_weight_is_left_out() -> None:
    weights = torch.tensor([1.0, 5e-4, 0.0])
    alone = mixture(x_of(), torch.tensor([1.0, 0.0, 0.0]), LOW, HIGH, 4, symmetric=False)
    assert torch.equal(mixture(x_of(), weights, LOW, HIGH, 4, symmetric=False), alone)


def test_rounding_moves_both_bounds_as_a_learned_step_size_does() -> None:
    x, upstream = torch.tensor([0.1, 0.37, -0.52, 0.65]), torch.tensor([1.0, 2.0, 1.0, 3.0])
    low, high = torch.tensor([-1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    (upstream * mixture(x, torch.ones(1), low, high, 3, symmetric=False)).sum().backward()
    # straight through the rounding, Q(x) = x + s r with a constant r = round(x / s) - x / s, and s = (high - low) / 7
    scale, zero_point = affine_parameters(low.detach(), high.detach(), 3, symmetric=False)
    rest = (fake_quantize(x, scale, zero_point, *integer_range(3)) - x) / scale
    expected = float((upstream * rest).sum()) / 7
    assert expected < -0.2  # all four are rounded down
    assert high.grad.item() == pytest.approx(expected, rel=1e-4)
    assert low.grad.item() == pytest.approx(-expected, rel=1e-4)
