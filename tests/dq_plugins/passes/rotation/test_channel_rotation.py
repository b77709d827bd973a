from __future__ import annotations

import copy

import pytest
import torch
from denoisers import TinyDenoiser, recorded
from torch import nn

import dq_plugins as dq
from dq_plugins.metrics.output_error import output_sqnr
from dq_plugins.passes.rotation.channel_rotation import rotation_of
from dq_plugins.quantized.layer_transform import LayerTransform
from dq_plugins.quantized.rotate import Rotate
from dq_plugins.recipe import Recipe, Step

AFTER = (Step("weight-ranges"), Step("timestep-groups", {"groups": 3}), Step("activation-ranges"))


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


def make(case, *steps: Step, bits: int = 4, **options) -> dq.QuantPlan:
    recipe = Recipe("r", "", steps)
    return dq.make_plan(*case, recipe, weight_bits=bits, act_bits=bits, edge_bits=bits, progress=False, **options)


def sqnr(case, plan: dq.QuantPlan) -> float:
    values = output_sqnr(dq.apply(copy.deepcopy(case[0]), plan, backend="simulate"), case[1]).values()
    return sum(values) / len(values)


def rotated(plan: dq.QuantPlan) -> dict[str, str]:
    return {name: layer.rotation.kind for name, layer in plan.layers.items() if layer.rotation is not None}


def test_a_loud_channel_costs_the_others_less(case) -> None:
    plan = make(case, Step("rotation"), *AFTER)
    assert rotated(plan)
    assert sqnr(case, plan) > sqnr(case, make(case, *AFTER)) + 1


def test_full_precision_is_unchanged(case) -> None:
    plan = make(case, Step("channel-balance"), Step("rotation"), *AFTER, bits=16)
    assert rotated(plan)
    assert sqnr(case, plan) > 60


def test_a_gain_too_small_leaves_layers_as_they_are(case) -> None:
    assert not rotated(make(case, Step("rotation", {"least_gain": 0.999}), *AFTER))


def test_principal_axes_even_out_every_block() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 16, generator=g) @ torch.randn(16, 16, generator=g) * torch.logspace(-1, 1, 16)
    rotation = rotation_of("principal-axes", nn.Linear(16, 4), x, 16)
    assert rotation.matrix.shape == (1, 16, 16)
    power = Rotate(rotation)(x.double()).square().mean(0)
    torch.testing.assert_close(power, torch.full_like(power, float(power.mean())), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("layer", "block"), [(nn.Linear(3, 4), None), (nn.Linear(96, 4), 32), (nn.Conv2d(32, 4, 3, groups=4), 8)]
)
def test_the_largest_block_that_fits(layer, block) -> None:
    found = rotation_of("hadamard", layer, torch.randn(5, 8), 64)
    assert (None if found is None else found.block) == block


@pytest.mark.parametrize("method", ["hadamard", "principal-axes"])
def test_stacked_saved_resumed_and_in_integers(case, method, tmp_path) -> None:
    steps = (
        Step("channel-balance", {"least_gain": 0.0}),
        Step("rotation", {"methods": [method], "least_gain": 0.0}),
        Step("weight-ranges"),
        Step("gptq"),
        Step("timestep-groups", {"groups": 3}),
        Step("activation-ranges"),
        Step("bias-correction"),
        Step("learned-ranges", {"passes": 0.2}),
    )
    plan = make(case, *steps, workdir=tmp_path / "work", weight_group_size=8)
    assert rotated(plan)
    assert make(case, *steps, workdir=tmp_path / "work", weight_group_size=8).hash == plan.hash
    plan.save(tmp_path / "plan")
    plan = dq.QuantPlan.load(tmp_path / "plan")
    integer = dq.apply(copy.deepcopy(case[0]), plan, backend="torchao")
    call = next(iter(case[1].calls()))
    with torch.no_grad():
        found, expected = (call.run(m) for m in (integer, dq.apply(copy.deepcopy(case[0]), plan, backend="simulate")))
    assert float((found - expected).norm() / expected.norm()) < 0.05  # a tie in rounding may fall either way
    better = sqnr(case, plan)
    assert better > sqnr(case, make(case, Step("weight-ranges"), *AFTER[1:]))


def test_gptq_sees_rotated_inputs(case) -> None:
    first = make(case, Step("rotation", {"least_gain": 0.0}), Step("weight-ranges"), Step("gptq"), *AFTER[1:])
    name = next(iter(rotated(first)))
    layer, module = first.layers[name], case[0].get_submodule(name)
    transform = LayerTransform(None, Rotate(layer.rotation))
    weight = transform.of_weight(module, module.weight)
    relative = (layer.weight.fake_quantize(weight) - weight).norm() / weight.norm()
    assert relative < 0.5  # codes of another basis would be wrong altogether


def test_others_refuse_by_name(case) -> None:
    plan = make(case, Step("rotation"), *AFTER)
    with pytest.raises(dq.DQError, match=r"'brevitas' does not implement rotation \(layer "):
        dq.apply(copy.deepcopy(case[0]), plan, backend="brevitas")
    with pytest.raises(dq.DQError, match=r"'PT2E' does not implement rotation \(layer "):
        plan.refuse_unimplemented((), "PT2E")


@pytest.mark.parametrize("late", ["channel-balance", "rotation", "low-rank"])
@pytest.mark.parametrize("early", ["weight-ranges", "activation-ranges"])
def test_what_transforms_inputs_comes_before_their_ranges(case, early, late) -> None:
    steps = [Step("weight-ranges"), *AFTER[1:]]
    place = next(i for i, step in enumerate(steps) if step.name == early)
    steps.insert(place + 1, Step(late))
    with pytest.raises(dq.DQError, match=f"'(weight-ranges|activation-ranges)' must come after '{late}'"):
        make(case, *steps)
