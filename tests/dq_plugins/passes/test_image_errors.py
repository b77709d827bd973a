from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from denoisers import TinyDenoiser, recorded

import dq_plugins as dq
from dq_plugins.errors import CalibrationError
from dq_plugins.passes.image_errors import errors_by_layer, image_errors, image_parts, whole_runs
from dq_plugins.plan import DynamicActivationQuant, QuantPlan, Targets
from dq_plugins.progress import finish
from dq_plugins.quantized.weight_scale import layer_quantizer
from dq_plugins.recipe import PassContext, Recipe, Step
from dq_plugins.sensitivity.exact_noise import replayed_errors


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> PassContext:
    torch.manual_seed(0)
    denoiser = TinyDenoiser(width=16).eval().requires_grad_(False)
    return PassContext(
        denoiser, recorded(denoiser, tmp_path_factory.mktemp("calib"), batch=8), Targets(6, 6, edge_bits=6)
    )


def planned(context: PassContext, *steps: Step) -> QuantPlan:
    given = {"weight_bits": 6, "act_bits": 6, "edge_bits": 6, "progress": False}
    return dq.make_plan(context.denoiser, context.calibration, Recipe("r", "", steps), **given)


def test_errors_of_a_plan_are_those_of_the_denoiser_that_it_makes(context) -> None:
    plan = planned(context, Step("weight-ranges"), Step("activation-ranges"))
    runs = whole_runs(context, 1)
    found = image_errors(plan, context, runs)
    applied = dq.apply(copy.deepcopy(context.denoiser), plan, backend="simulate")
    assert found.shape == (8,)
    assert bool((found > 0).all())
    torch.testing.assert_close(found, replayed_errors(applied, runs), rtol=1e-4, atol=0.0)


def test_errors_of_layers_are_those_of_each_alone(context) -> None:
    """Within a factor of two, by four probes, where layers differ by a thousand."""
    plan, runs = planned(context, Step("timestep-groups")), whole_runs(context, 1)
    layers = [name for name, layer in plan.layers.items() if layer.kind in ("linear", "conv2d")]
    found = finish(errors_by_layer(plan, context, layers))
    exact = {}
    for name in layers:
        layer = context.denoiser.get_submodule(name)
        quants = layer_quantizer(layer, 6, context.targets), DynamicActivationQuant(6, context.targets.symmetric_acts)
        alone = replace(plan, layers=dict(plan.layers))
        alone.layers[name] = replace(plan.layers[name], weight=quants[0], activation=quants[1])
        exact[name] = float(image_errors(alone, context, runs).mean())
    assert max(exact.values()) > 1000 * min(exact.values())
    assert all(0.5 < found[name] / exact[name] < 2 for name in layers)


def test_a_part_of_a_recording_says_nothing_of_images(context) -> None:
    part = replace(context, calibration=context.calibration.spread(2))
    assert whole_runs(part, 2, required=False) == []
    with pytest.raises(CalibrationError, match="no complete sampling run"):
        whole_runs(part, 2)
    assert finish(errors_by_layer(planned(context, Step("timestep-groups")), part, ["p"])) is None


def test_images_one_at_a_time_say_what_all_together_do(context, monkeypatch) -> None:
    plan = planned(context, Step("timestep-groups"))
    layers = [name for name, layer in plan.layers.items() if layer.kind in ("linear", "conv2d")]
    (run,) = whole_runs(context, 1)
    assert image_parts(context, [run], 4) == [run]
    together = finish(errors_by_layer(plan, context, layers))
    monkeypatch.setattr("dq_plugins.passes.image_errors.CHUNK_BYTES", 1)
    assert [part.images for part in image_parts(context, [run], 4)] == [1] * 8
    apart = finish(errors_by_layer(plan, context, layers))
    assert all(0.5 < apart[name] / together[name] < 2 for name in layers)
