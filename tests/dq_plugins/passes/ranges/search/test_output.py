import pytest
import torch
from denoisers import recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.affine import affine_parameters
from dq_plugins.passes.ranges.search.learn import mean_loss
from dq_plugins.passes.ranges.search.output import OutputLoss
from dq_plugins.passes.ranges.search.relaxation import Relaxation
from dq_plugins.quantized.denoiser_loss import Part
from dq_plugins.recipe import Recipe, Step


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    calibration = recorded(denoiser, tmp_path_factory.mktemp("calib"))
    recipe = Recipe("r", "", (Step("weight-ranges"), Step("activation-ranges")))
    return denoiser, calibration, dq.make_plan(denoiser, calibration, recipe, act_bits=4, edge_bits=2, progress=False)


def output_loss(case, **options) -> OutputLoss:
    denoiser, calibration, plan = case
    order = list(range(len(calibration.timesteps)))
    bits = {name: layer.activation.bits for name, layer in plan.layers.items()}
    options = {"symmetric": False, "order": order, "argument": "sample"} | options
    return OutputLoss(denoiser.requires_grad_(False), plan, calibration, bits, **options)


def planned_ranges(case) -> Relaxation:
    """The plan's own ranges, from its scales and zero points."""
    layers = [layer.activation for layer in case[2].layers.values()]
    low = torch.stack([(-8 - a.zero_point) * a.scale for a in layers])
    high = torch.stack([(7 - a.zero_point) * a.scale for a in layers])
    for a, lo, hi in zip(layers, low, high, strict=True):
        assert affine_parameters(lo, hi, 4, symmetric=False)[1] == a.zero_point
    return Relaxation(torch.zeros(1, 1, 1), low, high)


def test_one_group_costs_what_the_simulated_plan_does(case) -> None:
    denoiser, calibration, plan = case
    loss = output_loss(case, images=2)
    model = dq.apply(denoiser, plan, backend="simulate")
    noise = sum(float((c.run(model) - c.output).square().mean()) for c in calibration.calls())
    one = torch.ones(1, len(calibration.timesteps), 1)
    # of the two images of each call one is learned from and one held out
    found = mean_loss(loss, one, planned_ranges(case)) + loss.judge(one, planned_ranges(case))
    assert found * loss.power[""] / 2 == pytest.approx(noise / len(calibration), rel=0.02)


@pytest.mark.parametrize("units", [("",), ("body.0", "body.1"), ("enter", "body.0.beta")])
def test_the_loss_reaches_weights_and_ranges_of_the_units(case, units) -> None:
    loss, relaxation = output_loss(case, units=units, images=1), planned_ranges(case)
    doubled = Relaxation(
        torch.zeros(1, 5, 2), *(torch.cat([end, 2 * end], dim=1).detach() for end in relaxation.ranges())
    )
    weights = doubled.weights(1.0, loss.timesteps(3))
    loss.loss(3, weights, doubled).backward()
    assert doubled.rows[3].grad.abs().sum() > 0
    assert doubled.rows[2].grad is None
    assert doubled.log_ends.grad.abs().sum() > 0


def test_visits_take_turns_with_the_images_and_the_denoiser_is_left_alone(case) -> None:
    loss = output_loss(case, images=1)
    call = case[1].call(case[1].timesteps[0], 0)
    loss.parts[0] = ([Part(0, [0, 1])], [])  # as if neither were held out
    first, second = (loss.visited(0, turn).kwargs["sample"] for turn in (0, 1))
    assert torch.equal(torch.cat([first, second]), call.kwargs["sample"])
    mean_loss(loss, torch.ones(1, 5, 1), planned_ranges(case))
    assert all(not module._forward_pre_hooks for module in case[0].modules())


def test_images_that_are_held_out_are_never_learned_from(case) -> None:
    loss = output_loss(case, images=2)
    samples = case[1].call(case[1].timesteps[2], 0).kwargs["sample"]
    assert all(torch.equal(loss.visited(2, turn).kwargs["sample"], samples[:1]) for turn in range(3))


def test_balanced_inputs_are_quantized_as_the_plan_computes_them(case) -> None:
    denoiser, calibration, _ = case
    steps = Step("channel-balance", {"least_gain": 0.0}), Step("weight-ranges"), Step("activation-ranges")
    plan = dq.make_plan(denoiser, calibration, Recipe("r", "", steps), act_bits=4, edge_bits=2, progress=False)
    assert any(layer.balance is not None for layer in plan.layers.values())
    balanced = denoiser, calibration, plan
    loss, model = output_loss(balanced, images=2), dq.apply(denoiser, plan, backend="simulate")
    one = torch.ones(1, len(calibration.timesteps), 1)
    noise = sum(float((c.run(model) - c.output).square().mean()) for c in calibration.calls()) / len(calibration)
    found = mean_loss(loss, one, planned_ranges(balanced)) + loss.judge(one, planned_ranges(balanced))
    assert found * loss.power[""] / 2 == pytest.approx(noise, rel=0.02)
