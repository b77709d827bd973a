import pytest
import torch

from dq_plugins.affine import dynamic_parameters, fake_quantize, integer_range
from dq_plugins.quantized.straight_through import FakeQuantize, RoundThrough, fake_quantize_ste, sign, sign_ste

X = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_point", [0, torch.tensor(1, dtype=torch.int32), torch.tensor(-2, dtype=torch.int32)])
def test_values_are_those_of_the_quantizer_bit_for_bit(bits, zero_point):
    args = X, torch.tensor(0.37), zero_point, *integer_range(bits)
    assert torch.equal(fake_quantize_ste(*args), fake_quantize(*args))
    assert fake_quantize_ste(X.bfloat16(), *args[1:]).dtype == torch.bfloat16


def test_gradients_pass_inside_the_range_and_stop_outside():
    x = torch.tensor([-9.0, -0.4, 0.3, 9.0], requires_grad=True)
    scale, zero = torch.tensor(0.5, requires_grad=True), torch.tensor(1, dtype=torch.int32)
    fake_quantize_ste(x, scale, zero, -8, 7).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    # clipped: lowest and highest code less the zero point; inside: round(x / s) - x / s
    assert float(scale.grad) == pytest.approx((-8 - 1) + (7 - 1) + (-1 + 0.8) + (1 - 0.6), abs=1e-6)


def test_zero_and_negative_zero_are_plus_one():
    assert sign(torch.tensor([0.0, -0.0, -1e-30, 2.0])).tolist() == [1, 1, -1, 1]


def test_value_is_exactly_the_sign_far_inside_and_outside_the_clip():
    x = torch.linspace(-3, 3, 1001) * torch.logspace(-20, 2, 1001)
    assert torch.equal(sign_ste(x), sign(x))


def test_gradient_is_one_inside_the_clip_and_zero_outside():
    x = torch.tensor([-2.0, -0.9, 0.0, 0.9, 2.0], requires_grad=True)
    sign_ste(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_half_precision_stays_half():
    assert sign_ste(torch.randn(4).half()).dtype == torch.float16


@pytest.mark.parametrize("shape", [(), (6, 1, 1), (1, 5, 1)])
def test_the_lean_function_has_the_values_and_the_gradients_of_the_other(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, 40, generator=generator)
    found = []
    for function in (fake_quantize_ste, FakeQuantize.apply):
        x = (3 * torch.randn(6, 5, 40, generator=torch.Generator().manual_seed(1))).requires_grad_()
        scale = (0.3 + torch.rand(shape, generator=torch.Generator().manual_seed(2))).requires_grad_()
        zero_point = torch.full(shape, -2.0).requires_grad_()
        value = function(x, scale, zero_point, *integer_range(4))
        (value * weight).sum().backward()
        found.append((value.detach(), x.grad, scale.grad, zero_point.grad))
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_where_nothing_is_cut_off_the_gradient_passes_unchanged():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scale, zero = dynamic_parameters(x.detach(), 4, symmetric=False)
    found = RoundThrough.apply(x, scale, zero, -8, 7)
    assert torch.equal(found, fake_quantize(x.detach(), scale, zero, -8, 7))
    (found * torch.arange(24.0).reshape(3, 8)).sum().backward()
    assert torch.equal(x.grad, torch.arange(24.0).reshape(3, 8))
