from __future__ import annotations

import pytest
import torch
from denoisers import TinyDenoiser, recorded
from torch import nn

import dq_plugins as dq
from dq_plugins.metrics.output_error import output_sqnr
from dq_plugins.passes.correction.channel_balance import channel_magnitude
from dq_plugins.recipe import Recipe, Step

LOUD = ("body.0.gamma", "body.1.alpha")


class Loud(TinyDenoiser):
    """One channel of the first block's output is far louder than the others."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.enter.weight[3] *= 40


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    torch.manual_seed(0)
    denoiser = Loud().eval().requires_grad_(False)
    return denoiser, recorded(denoiser, tmp_path_factory.mktemp("calib"), batch=16)


AFTER = (
    Step("weight-ranges"),
    Step("timestep-groups", {"groups": 3}),
    Step("activation-ranges", {"observer": "minmax"}),
)


def make(case, *steps: Step, **options) -> dq.QuantPlan:
    return dq.make_plan(*case, Recipe("r", "", steps), weight_bits=8, act_bits=6, progress=False, **options)


def sqnr(case, plan: dq.QuantPlan) -> float:
    values = output_sqnr(dq.apply(case[0], plan, backend="simulate"), case[1]).values()
    return sum(values) / len(values)


def test_a_loud_channel_costs_the_others_less(case) -> None:
    balanced = make(case, Step("channel-balance"), *AFTER)
    assert balanced.layers["body.0.alpha"].balance is not None
    assert sqnr(case, balanced) > sqnr(case, make(case, *AFTER)) + 3


def test_full_precision_is_unchanged(case) -> None:
    plan = make(case, Step("channel-balance"), *AFTER)
    for layer in plan.layers.values():
        if layer.balance is not None:
            layer.weight = layer.activation = None
            layer.unquantized_reason = None
    recipe = (Step("channel-balance"), *AFTER)
    wide = dq.make_plan(*case, Recipe("r", "", recipe), weight_bits=16, act_bits=16, progress=False)
    assert sqnr(case, wide) > 70


def test_layers_of_the_timestep_alone_are_left_as_they_are(case) -> None:
    plan = make(case, Step("channel-balance"), *AFTER)
    assert all(plan.layers[name].balance is None for name in ("p", "q", "body.0.beta", "body.1.beta"))


def test_what_gains_too_little_is_left_as_it_is(case) -> None:
    plan = make(case, Step("channel-balance", {"least_gain": 0.999}), *AFTER)
    assert all(layer.balance is None for layer in plan.layers.values())


def test_ranges_weights_and_rounding_are_those_of_the_balanced_layer(case) -> None:
    plan = make(case, Step("channel-balance"), *AFTER)
    plain = make(case, *AFTER)
    changed = [n for n, layer in plan.layers.items() if layer.balance is not None]
    for name in changed:
        assert not torch.equal(plan.layers[name].weight.scale, plain.layers[name].weight.scale)
        assert not torch.equal(plan.layers[name].activation.scale, plain.layers[name].activation.scale)
    rounded = make(case, Step("channel-balance"), AFTER[0], Step("gptq"), *AFTER[1:])
    assert sqnr(case, rounded) > sqnr(case, plan) - 1


def test_it_survives_disk_and_a_second_run(case, tmp_path) -> None:
    plan = make(case, Step("channel-balance"), *AFTER)
    assert dq.QuantPlan.load(plan.save(tmp_path)) == plan
    assert make(case, Step("channel-balance"), *AFTER) == plan


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.t = nn.Linear(1, 6)
        self.q, self.k, self.out = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 6)
        with torch.no_grad():
            self.k.weight *= 0.01

    def forward(self, sample, timestep):
        x = sample * torch.tensor([1, 1, 30.0, 1, 1, 1]) + self.t(timestep.float().reshape(-1, 1) / 1000)[:, None]
        return self.out(torch.cat([self.q(x)[..., :2], self.k(x)], -1))


def test_layers_of_one_input_share_its_factors(tmp_path) -> None:
    denoiser = Attention().eval().requires_grad_(False)

    def sample(model):
        x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
        for t in (900.0, 500.0, 100.0):
            x = x - 0.1 * model(sample=x, timestep=torch.full((2,), t))

    calib = dq.record(denoiser, sample, out=tmp_path, progress=False)
    plan = make((denoiser, calib), Step("channel-balance"), *AFTER)
    assert plan.layers["q"].balance is not None
    assert torch.equal(plan.layers["q"].balance, plan.layers["k"].balance)


MEASURE = Step("sensitivity", {"weight_choices": (4, 8), "act_choices": (4, 6), "draws": 40, "check_entries": 8})


def test_bits_are_shared_out_over_balanced_layers(case) -> None:
    steps = (*AFTER, MEASURE, Step("bit-allocation", {"weight_bits": 6}))
    balanced, plain = make(case, Step("channel-balance"), *steps), make(case, *steps)
    assert balanced.layers["body.0.alpha"].balance is not None
    found = balanced.sections["bit-allocation"].data
    true = 10 ** (-sqnr(case, balanced) / 10)
    assert found["predicted_noise_power"] == pytest.approx(true, rel=0.7)
    assert sqnr(case, balanced) > sqnr(case, plain) + 1


def test_timesteps_are_left_out_of_a_balanced_plan(case) -> None:
    options = {"steps": (3,), "generations": 1, "population": 4, "seconds": 0.5}
    for measured in ((), (MEASURE,)):
        plan = make(case, Step("channel-balance"), *AFTER, *measured, Step("timestep-reduction", options))
        assert len(plan.sampling) == 3
        assert plan.layers["body.0.alpha"].balance is not None
        assert sqnr(case, plan) > 15


LAYERS = [nn.Linear(4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(4, 8, 1)]


@pytest.mark.parametrize("layer", LAYERS)
def test_magnitudes_are_of_the_weights_that_meet_a_channel(layer) -> None:
    torch.nn.init.constant_(layer.weight, 0.5)
    with torch.no_grad():
        layer.weight[-1, 1] = -2
    expected = torch.full((4,), 0.5)
    expected[3 if getattr(layer, "groups", 1) == 2 else 1] = 2
    assert torch.equal(channel_magnitude(layer), expected)
