from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from dq_plugins.affine import affine_parameters, fake_quantize, integer_range
from dq_plugins.errors import DQError, PlanError
from dq_plugins.layer_kinds import LAYER_KINDS
from dq_plugins.plan import ActivationQuant, DynamicActivationQuant, LayerPlan, WeightQuant
from dq_plugins.quantized.input_quantizers import ActivationQuantizer, quantize_dynamically
from dq_plugins.quantized.layer import LayerState, QuantizedLayer, planned_state, simulate_layer
from dq_plugins.quantized.layer_transform import LayerTransform
from dq_plugins.quantized.soft_rounding import SoftRounding
from dq_plugins.quantized.weight_scale import weight_parameters
from dq_plugins.timesteps import TimestepContext, TimestepGroups

CPU = torch.device("cpu")
QUANT = ActivationQuant(4, "all", torch.tensor([0.1, 0.4]), torch.tensor([0, 2], dtype=torch.int32))
X = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))


def context() -> TimestepContext:
    return TimestepContext({"all": TimestepGroups((500.0,))})


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 5)


def plan(module: nn.Module) -> LayerPlan:
    weight = WeightQuant(4, weight_parameters(module.weight, 4)[0])
    return LayerPlan("linear", weight=weight, activation=QUANT, unquantized_reason=None)


def by_hand(module: nn.Linear, x: torch.Tensor, group: int) -> torch.Tensor:
    weight = plan(module).weight.fake_quantize(module.weight.detach())
    return nn.functional.linear(QUANT.fake_quantize(x, group), weight, module.bias)


def test_a_planned_state_computes_the_definition_in_every_group_and_is_taken_away_without_a_trace():
    module, where = layer(), context()
    before, hooks, own = dict(vars(module)), dict(module._forward_pre_hooks), module.weight
    quantized = QuantizedLayer(module)
    quantized.use(planned_state(module, plan(module), where))
    with torch.no_grad():
        for t, group in ((100, 0), (900, 1)):
            with where.select(t):
                found = module(X), module(input=X)
            assert all(torch.equal(each, by_hand(layer(), X, group)) for each in found)
    quantized.use(LayerState())
    assert torch.equal(module(X), layer()(X))
    quantized.remove()
    assert module.weight is own
    assert module._forward_pre_hooks == hooks
    assert vars(module).keys() == before.keys()
    assert not module._modules


def test_samples_of_several_timesteps_get_their_own_parameters():
    module, where = layer(), context()
    simulate_layer(module, plan(module), where)
    with torch.no_grad(), where.select(torch.tensor([100, 900, 900, 100])):
        found = module(X)
    for row, group in enumerate((0, 1, 1, 0)):
        torch.testing.assert_close(found[row], by_hand(layer(), X[row : row + 1], group)[0])


def test_gradients_reach_input_weight_and_scale_straight_through():
    module, where = layer(), context()
    quantizer = ActivationQuantizer(QUANT, where, CPU)
    step = torch.zeros(2, requires_grad=True)
    quantizer.scale = QUANT.scale * step.exp()
    rounding = SoftRounding(module.weight, plan(module).weight)
    QuantizedLayer(module).use(LayerState(rounding.soft(), quantizer))
    x = X.clone().requires_grad_()
    with where.select(900):
        module(x).square().sum().backward()
    assert bool(x.grad.any())
    assert bool(rounding.parameter.grad.any())
    assert step.grad[0] == 0  # the group that did not run
    assert step.grad[1] != 0


def test_a_state_is_replaced_without_computing_anything():
    module, where = layer(), context()
    quantized = QuantizedLayer(module)
    weight = torch.ones_like(module.weight)
    quantized.use(LayerState(weight, ActivationQuantizer(QUANT, where, CPU)))
    assert module.weight is weight
    assert module.input_quantizer.scale is not QUANT.scale


def test_copies_and_pickles_of_a_simulated_layer_use_their_own_parameters():
    module, where = layer(), context()
    simulate_layer(module, plan(module), where)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.input_quantizer is not module.input_quantizer
        other.input_quantizer.scale.mul_(4)
        with torch.no_grad(), where.select(100), other.input_quantizer.context.select(100):
            assert not torch.equal(other(X), module(X))
    assert torch.equal(module.input_quantizer.scale, QUANT.scale)


def test_a_module_without_a_weight_is_refused():
    with pytest.raises(PlanError, match="a ReLU has no weight tensor"):
        QuantizedLayer(nn.ReLU())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dynamic_ranges_use_the_extremes_of_each_token(bits, symmetric):
    x = X * torch.logspace(-5, 4, 12).reshape(4, 3, 1)
    x[0, 0], x[1, 1] = 0.0, 2.5
    found = quantize_dynamically(x, DynamicActivationQuant(bits, symmetric))
    for row, quantized in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        step = max(-low, high) / max(2 ** (bits - 1) - 1, 1) if symmetric else (high - low) / (2**bits - 1)
        furthest = 0.5001 if symmetric else 1.001  # an asymmetric zero point is rounded too
        assert float((quantized - row).abs().max()) <= furthest * step + 1e-12
        assert len(quantized.unique()) <= 2**bits
    assert torch.equal(found[0, 0], torch.zeros(8))
    torch.testing.assert_close(found[1, 1], x[1, 1])


def test_dynamic_ranges_are_those_of_the_balanced_input():
    balance, quant = torch.linspace(0.2, 5, 8), DynamicActivationQuant(4)
    balanced = quantize_dynamically(X, quant, LayerTransform(balance), LAYER_KINDS["linear"])
    torch.testing.assert_close(balanced, quantize_dynamically(X / balance, quant) * balance)
    assert not torch.allclose(balanced, quantize_dynamically(X, quant))


def test_dynamic_ranges_pass_gradients_and_need_no_timestep():
    module, x = layer(), X.clone().requires_grad_()
    simulate_layer(module, replace(plan(module), activation=DynamicActivationQuant(4)), context())
    assert module(X).shape == (4, 3, 5)
    module.input_quantizer(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert "symmetric" not in repr(module.input_quantizer)
    assert set(module.input_quantizer.state_dict()) == {"code_widths"}  # no table: nothing was calibrated


@pytest.mark.parametrize("symmetric", [False, True])
def test_dynamic_ranges_are_cut_off_at_a_share_of_the_extremes(symmetric):
    x, clip = X.clone().requires_grad_(), torch.tensor(0.6, requires_grad=True)
    quant = DynamicActivationQuant(4, symmetric, clip=0.6)
    found, learned = quantize_dynamically(x, quant), quantize_dynamically(x, replace(quant, clip=1.0), clip=clip)
    scale, zero = affine_parameters(0.6 * X.amin(-1, True), 0.6 * X.amax(-1, True), 4, symmetric=symmetric)
    assert torch.equal(found, fake_quantize(X, scale, zero, *integer_range(4)))
    assert torch.equal(found, learned)
    learned.square().sum().backward()
    code = X / scale + zero
    inside = (code >= -8) & (code <= 7)
    assert not inside.all()
    torch.testing.assert_close(x.grad, torch.where(inside, 2 * found.detach(), 0.0))
    # LSQ: of what is cut off the code, of the rest what rounding adds; the scale is the clip times the extremes
    slope = 2 * found * torch.where(inside, found - X, found)
    torch.testing.assert_close(clip.grad, slope.detach().sum() / 0.6)


def widths_by_group() -> ActivationQuant:
    scale, zero_point = torch.tensor([0.1, 0.4, 0.02]), torch.tensor([0, 1, 3], dtype=torch.int32)
    return ActivationQuant(8, "three", scale, zero_point, (4, None, 8))


def test_each_timestep_group_has_its_own_width_and_one_may_have_none():
    quant, where = widths_by_group(), TimestepContext({"three": TimestepGroups((300.0, 700.0))})
    quantizer = ActivationQuantizer(quant, where, CPU)
    expected = [fake_quantize(X, quant.scale[0], quant.zero_point[0], -8, 7), X]
    expected.append(fake_quantize(X, quant.scale[2], quant.zero_point[2], -128, 127))
    for t, value in zip((100, 500, 900), expected, strict=True):
        with where.select(t):
            assert torch.equal(quantizer(X), value)
    with where.select(torch.tensor([900.0, 500.0, 100.0, 100.0])):
        rows = [expected[g][i] for i, g in enumerate((2, 1, 0, 0))]
        assert torch.equal(quantizer(X), torch.stack(rows))
    assert all(torch.equal(quant.fake_quantize(X, g), each) for g, each in enumerate(expected))


def test_gradients_of_a_group_are_those_of_its_width_and_pass_where_it_has_none():
    where = TimestepContext({"three": TimestepGroups((300.0, 700.0))})
    quantizer = ActivationQuantizer(widths_by_group(), where, CPU)
    for t, passes in ((100, lambda x: (x * 10 >= -8) & (x * 10 <= 7)), (500, torch.ones_like)):
        x = X.clone().requires_grad_()
        with where.select(t):
            quantizer(x).sum().backward()
        assert torch.equal(x.grad.bool(), passes(X).bool())


@pytest.mark.parametrize("widths", [(4, 8), (None, None, None), (4, 4, 4), (4, 17, 8)])
def test_widths_that_are_not_those_of_the_groups_are_refused(widths):
    quant = widths_by_group()
    with pytest.raises(DQError, match="bits"):
        replace(quant, group_bits=widths)


def test_a_layer_says_its_widths_and_adapters_must_know_them():
    entry = LayerPlan("linear", weight=plan(layer()).weight, activation=widths_by_group(), unquantized_reason=None)
    assert (entry.width, entry.features) == ("W4A4/8/32", ("group_widths",))
