import copy

import pytest
import torch
from torch import Tensor, nn

from dq_plugins.affine import affine_parameters, fake_quantize
from dq_plugins.errors import PlanError
from dq_plugins.hashing import weights_hash
from dq_plugins.plan import ActivationQuant, LayerPlan, QuantPlan, WeightQuant
from dq_plugins.quantized.simulate import SimulateAdapter
from dq_plugins.quantized.weight_scale import weight_parameters
from dq_plugins.timesteps import Schedule, TimestepGroups


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.linear = nn.Linear(3, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.linear(self.conv(sample).flatten(2).mT)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


def plan_for(net: Net, scales: list[float], bits: int = 8, weight_bits: int = 8) -> QuantPlan:
    edges = tuple(500.0 * (i + 1) for i in range(len(scales) - 1))
    quant = {
        name: LayerPlan(
            kind=name,
            weight=WeightQuant(weight_bits, weight_parameters(layer.weight, weight_bits)[0]),
            activation=ActivationQuant(bits, "g", torch.tensor(scales), torch.arange(len(scales), dtype=torch.int32)),
            unquantized_reason=None,
        )
        for name, layer in (("conv", net.conv), ("linear", net.linear))
    }
    return QuantPlan(
        "Net", weights_hash(net), "timestep", Schedule((900.0, 100.0)), {"g": TimestepGroups(edges)}, quant
    )


X = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def by_hand(net: Net, plan: QuantPlan, x: Tensor, group: int) -> Tensor:
    conv, linear = plan.layers["conv"], plan.layers["linear"]
    x = nn.functional.conv2d(
        conv.activation.fake_quantize(x, group), conv.weight.fake_quantize(net.conv.weight), net.conv.bias, padding=1
    )
    x = linear.activation.fake_quantize(x.flatten(2).mT, group)
    return nn.functional.linear(x, linear.weight.fake_quantize(net.linear.weight), net.linear.bias)


@pytest.mark.parametrize(("t", "group"), [(100, 0), (700, 1)])
def test_equals_the_definition_at_every_group(net: Net, t: int, group: int) -> None:
    plan = plan_for(net, [0.02, 0.05])
    expected = by_hand(net, plan, X, group)
    assert torch.equal(SimulateAdapter().apply(net, plan)(X, torch.tensor(t)), expected)


def test_one_group_equals_the_static_quantizer_bit_for_bit(net: Net) -> None:
    grouped = SimulateAdapter().apply(copy.deepcopy(net), plan_for(net, [0.03]))

    class Static(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = torch.tensor(scale)

        def forward(self, x: Tensor) -> Tensor:
            return fake_quantize(x, self.scale, 0, -128, 127)

    static = copy.deepcopy(net)
    for layer in (static.conv, static.linear):
        scale = weight_parameters(layer.weight, 8)[0]
        layer.weight.copy_(fake_quantize(layer.weight, scale.view(-1, *[1] * (layer.weight.dim() - 1)), 0, -128, 127))
        quantizer = Static(0.03)
        layer.register_forward_pre_hook(lambda _, args, q=quantizer: (q(args[0]),))
    for t in (0, 400, 999):
        assert torch.equal(grouped(X, torch.tensor(t)), static(X, torch.tensor(t)))


def test_per_sample_timesteps_equal_single_calls(net: Net) -> None:
    model = SimulateAdapter().apply(net, plan_for(net, [0.02, 0.08]))
    both = model(X, torch.tensor([100, 900]))
    for i, t in enumerate((100, 900)):
        torch.testing.assert_close(both[i], model(X[i : i + 1], torch.tensor(t))[0])


def test_names_and_classes_stay(net: Net) -> None:
    names = set(net.state_dict())
    model = SimulateAdapter().apply(net, plan_for(net, [0.02]))
    assert type(model.conv) is nn.Conv2d
    assert names <= set(model.state_dict())


def test_more_bits_less_error(net: Net) -> None:
    reference = net(X, torch.tensor(1))
    errors = []
    for bits in (2, 4, 8):
        low, high = X.min(), X.max()
        plan = plan_for(net, [float(affine_parameters(low, high, bits, symmetric=True)[0])], bits, bits)
        model = SimulateAdapter().apply(copy.deepcopy(net), plan)
        errors.append(float((model(X, torch.tensor(1)) - reference).square().mean()))
    assert errors[0] > errors[1] > errors[2]


def test_a_plan_it_does_not_understand_is_refused(net: Net) -> None:
    from dq_plugins.plan import Section

    plan = plan_for(net, [0.02])
    plan.sections["secret"] = Section(critical=True)
    with pytest.raises(PlanError, match="secret"):
        SimulateAdapter().apply(net, plan)
