from __future__ import annotations

import torch

from dq_plugins.quantized.signs import sign, sign_ste


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
