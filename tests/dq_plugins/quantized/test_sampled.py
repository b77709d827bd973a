from __future__ import annotations

import pytest
import torch
from torch import nn

import dq_plugins as dq
from dq_plugins.affine import affine_parameters
from dq_plugins.errors import RecipeError
from dq_plugins.hooks import hooked
from dq_plugins.layer_kinds import kind_name, kind_of
from dq_plugins.observers import observe_groups
from dq_plugins.quantized.sampled import SampledStatistics
from dq_plugins.quantized.statistics import Collector
from dq_plugins.recipe import Recipe, Step
from dq_plugins.testing.denoiser import TinyDenoiser, calibrated, example_inputs, sample


def observed(denoiser: nn.Module, leave_out: str = "", example: dict | None = None) -> SampledStatistics:
    """What the layers see while the denoiser samples."""
    collector, running = Collector(), {}
    layers = {name: m for name, m in denoiser.named_modules() if kind_of(m) and name != leave_out}
    with (
        torch.no_grad(),
        hooked({"": denoiser}, before=lambda name, args, kwargs: running.update(t=kwargs["timestep"])),
        hooked(layers, before=lambda name, args, kwargs: collector.see(name, args[0], running["t"])),
    ):
        sample(denoiser)
    return SampledStatistics(collector, {n: kind_name(m) for n, m in layers.items()}, "timestep", example)


@pytest.mark.parametrize("recipe", ["fast", "ranges"])
def test_the_plan_is_that_of_recorded_calls(recipe):
    with calibrated() as (denoiser, calibration):
        recorded = dq.make_plan(denoiser, calibration, recipe, weight_bits=4, act_bits=6, progress=False)
    plan = dq.make_plan(
        denoiser, observed(denoiser, example=example_inputs()), recipe, weight_bits=4, act_bits=6, progress=False
    )
    assert plan == recorded


@pytest.mark.parametrize("observer", ["percentile", "mse", "minmax"])
def test_observers_of_distributions_need_no_recorded_calls(observer):
    ranges = Step("activation-ranges", {"observer": observer})
    steps = (Step("weight-ranges"), Step("timestep-groups", {"groups": 2}), ranges)
    with calibrated() as (denoiser, calibration):
        recorded = dq.make_plan(denoiser, calibration, Recipe("r", "", steps), act_bits=5, progress=False)
        groups = recorded.groups["default"]
        if observer == "percentile":
            make = dq.get("observer", observer)
            watched = observe_groups(denoiser, calibration, ["up"], lambda _: make(bits=5, symmetric=False), groups)
            scale, _ = affine_parameters(*watched["up"], 5, symmetric=False)
            assert torch.equal(recorded.layers["up"].activation.scale, scale)
    source = observed(denoiser, example=example_inputs())
    assert dq.make_plan(denoiser, source, Recipe("r", "", steps), act_bits=5, progress=False) == recorded


def test_layers_have_no_roles_where_nothing_can_be_traced():
    denoiser = TinyDenoiser()
    bad = {"sample": "what no graph can be made of"}
    for source in (observed(denoiser), observed(denoiser, example=bad)):
        plan = dq.make_plan(denoiser, source, "fast", weight_bits=4, progress=False)
        assert {(layer.width, layer.roles) for layer in plan.layers.values()} == {("W4A8", frozenset())}


def test_layers_that_were_not_observed_or_did_not_run_say_so():
    denoiser = TinyDenoiser()
    denoiser.idle = nn.Linear(2, 2)
    source = observed(denoiser, leave_out="up", example=example_inputs())
    plan = dq.make_plan(denoiser, source, "fast", progress=False)
    reasons = {name: layer.why for name, layer in plan.layers.items() if not layer.quantized}
    assert reasons == {"up": "it was not among the layers to quantize", "idle": "it did not run during calibration"}


def test_recipes_that_need_recorded_calls_say_so():
    denoiser = TinyDenoiser()
    with pytest.raises(RecipeError, match=r"needs recorded calls.*'fast' or 'ranges'.*dq_plugins\.record"):
        dq.make_plan(denoiser, observed(denoiser, example=example_inputs()), "tfmq", progress=False)


def test_a_denoiser_that_was_observed_twice_gives_one_hash():
    denoiser = TinyDenoiser()
    assert observed(denoiser).hash == observed(denoiser).hash
    assert observed(denoiser).hash != observed(TinyDenoiser(seed=1)).hash
