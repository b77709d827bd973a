from __future__ import annotations

import copy
import math

import pytest
import torch

from dq_plugins.affine import fake_quantize, integer_range
from dq_plugins.quantized.learned_step import LearnedStepActivation, LearnedStepWeight, learned_step_quantize


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_value_is_the_shared_fake_quantizer_bit_for_bit(bits):
    x = torch.randn(64, 33) * 3
    quantizer = LearnedStepActivation(bits)
    y = quantizer(x)
    assert torch.equal(y, fake_quantize(x, quantizer.scale(), 0, *integer_range(bits)))
    assert y.unique().numel() <= 2**bits


def test_first_batch_sets_the_step_and_later_ones_do_not():
    quantizer = LearnedStepActivation(4)
    x = torch.randn(1000)
    quantizer(x)
    expected = 2 * x.abs().mean() / math.sqrt(7)
    torch.testing.assert_close(quantizer.step.detach(), expected)
    quantizer(100 * x)
    torch.testing.assert_close(quantizer.step.detach(), expected)


def test_gradients_are_those_of_the_paper():
    x = torch.tensor([-100.0, -0.6, 0.2, 0.9, 100.0], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    learned_step_quantize(x, step, 4, x.numel()).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    v = x.detach() / 0.5
    per_element = torch.where(v <= -8, -8.0, torch.where(v >= 7, 7.0, v.round() - v))
    torch.testing.assert_close(step.grad, per_element.sum() / math.sqrt(5 * 7))


def test_training_the_step_reduces_the_error_of_a_bad_start():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    quantizer = LearnedStepActivation(4)
    quantizer(x)
    with torch.no_grad():
        quantizer.step.mul_(4)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    first = None
    for _ in range(250):
        optimizer.zero_grad()
        error = (quantizer(x) - x).square().mean()
        error.backward()
        optimizer.step()
        first = first or float(error.detach())
    assert float(error.detach()) < 0.2 * first


def test_state_dict_carries_whether_it_started():
    quantizer, other = LearnedStepActivation(8), LearnedStepActivation(8)
    x = torch.randn(50)
    y = quantizer(x)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x), y)
    other(1000 * x)
    assert torch.equal(copy.deepcopy(other)(x), y)


def test_half_precision_input_keeps_its_dtype():
    assert LearnedStepActivation(8)(torch.randn(9).bfloat16()).dtype == torch.bfloat16


def test_weight_steps_are_per_output_channel_and_start_without_clipping():
    weight = torch.randn(6, 3, 3, 3) * torch.logspace(-3, 1, 6).reshape(-1, 1, 1, 1)
    quantizer = LearnedStepWeight(weight)
    error = (quantizer(weight) - weight).abs().flatten(1).amax(1)
    assert (error <= 0.5001 * quantizer.scale()).all()


def test_compiled_quantizer_equals_eager():
    quantizer = LearnedStepActivation(8)
    x = torch.randn(16, 8)
    eager = quantizer(x)
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), eager)
