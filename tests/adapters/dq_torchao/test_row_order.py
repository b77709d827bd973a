"""Samples of one batch at several timesteps have the ranges that they have alone, wherever a layer sees them."""

import dq_torchao
import pytest
import torch
from row_layouts import ORDERS, TIMESTEPS, Layout, noise, planned

import dq_plugins as dq
from dq_plugins.errors import TimestepError
from dq_plugins.recipe import Recipe, Step

KNOWN = [layout for layout, order in ORDERS.items() if order != "mixed"]
B = len(TIMESTEPS)


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    return {layout: planned(Layout(layout), tmp_path_factory.mktemp("calib")) for layout in ORDERS}


def quantized(layout, plan, backend="simulate", **options):
    return dq.apply(Layout(layout).eval().requires_grad_(False), plan, backend=backend, **options)


@torch.no_grad()
def alone(model, x):
    return torch.cat([model(x[i : i + 1], torch.tensor([t])) for i, t in enumerate(TIMESTEPS)])


@pytest.mark.parametrize("backend", ["simulate", "torchao", "brevitas"])
@pytest.mark.parametrize("layout", KNOWN)
def test_every_sample_has_the_range_of_its_timestep(plans, layout, backend):
    model = quantized(layout, plans[layout], backend)
    for tokens in (4, B, 2 * B):  # as many tokens as samples, too
        x = noise(B, tokens, seed=1)
        with torch.no_grad():
            together = model(x, torch.tensor(TIMESTEPS))
        torch.testing.assert_close(together, alone(model, x), atol=1e-5, rtol=1e-5)


def test_another_range_would_show(plans):
    """The order the other way round is off by far more than the tolerance above."""
    plan = plans["(S B) C"]
    right = quantized("(S B) C", plan)
    plan.layers["middle"].rows = "first"
    try:
        wrong = quantized("(S B) C", plan)
    finally:
        plan.layers["middle"].rows = "fastest"
    x, t = noise(B, seed=1), torch.tensor(TIMESTEPS)
    with torch.no_grad():
        assert float((wrong(x, t) - right(x, t)).abs().max()) > 0.05


@pytest.mark.parametrize("layout", ["(S B) C", "S B C"])
def test_compiled_and_saved(plans, layout, tmp_path):
    model, x, t = quantized(layout, plans[layout], "torchao"), noise(B, B, seed=1), torch.tensor(TIMESTEPS)
    with torch.no_grad():
        eager = model(x, t)
        assert not torch.allclose(eager, model(x, t.flip(0)), atol=1e-3)
        dq_torchao.save(model, tmp_path)
        loaded = dq_torchao.load(Layout(layout).eval().requires_grad_(False), tmp_path)
        assert torch.equal(loaded(x, t), eager)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x, t), eager, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["simulate", "torchao"])
def test_in_no_known_order_one_timestep_works_and_several_are_an_error(plans, backend):
    model, x = quantized("S/2 2 B C", plans["S/2 2 B C"], backend), noise(2, seed=1)
    compiled = torch.compile(model, backend="aot_eager")
    same, several = torch.tensor([500.0, 500.0]), torch.tensor([500.0, 100.0])
    with torch.no_grad():
        assert torch.equal(model(x, same), model(x, torch.tensor(500.0)))
        torch.testing.assert_close(compiled(x, same), model(x, same), atol=1e-5, rtol=1e-5)
        with pytest.raises(TimestepError, match="which rows"):
            model(x, several)
        with pytest.raises(RuntimeError, match="which rows"):
            compiled(x, several)


def test_the_order_is_in_the_plan_and_adapters_have_to_know_it(plans, tmp_path):
    for layout, plan in plans.items():
        found = dq.QuantPlan.load(plan.save(tmp_path / ORDERS[layout]))
        assert found.layers["middle"].rows == ORDERS[layout]
        assert found.features.get("row_order", ()) == (() if ORDERS[layout] == "first" else ("middle",))


def test_means_of_outputs_are_corrected_by_sample(tmp_path):
    """Recorded in one batch of three timesteps, a bias correction is that of three calls."""

    def together(denoiser):
        denoiser(noise(B), torch.tensor(TIMESTEPS))

    def apart(denoiser):
        for i, t in enumerate(TIMESTEPS):
            denoiser(noise(B)[i : i + 1], torch.tensor([t]))

    for layout in KNOWN:
        tables = []
        for how in (together, apart):
            model = Layout(layout).eval()
            calibration = dq.record(model, how, tmp_path / f"{ORDERS[layout]} {layout.count('(')} {how.__name__}")
            passes = ("weight-ranges", "timestep-groups", "activation-ranges", "bias-correction")
            recipe = Recipe("r", "", tuple(Step(name) for name in passes))
            options = {"timestep-groups": {"groups": B}}
            plan = dq.make_plan(model, calibration, recipe, weight_bits=4, act_bits=4, options=options, progress=False)
            assert plan.layers["middle"].rows == ORDERS[layout]
            tables.append(plan.layers["middle"].bias_correction.values)
        torch.testing.assert_close(*tables, atol=1e-4, rtol=1e-3)


def test_calibrating_by_sampling_finds_the_order_at_the_first_call_that_needs_it():
    from torchao.quantization import quantize_

    x, t = noise(B, seed=1), torch.tensor(TIMESTEPS)
    for layout in ("(S B) C", "S B C"):
        models = []
        for batches in (1, B):
            model = Layout(layout).eval().requires_grad_(False)
            config = {"groups": B, "recipe": "ranges"}
            linear = dq_torchao.linear_and_conv2d
            quantize_(model, dq_torchao.TimestepInt8Config(step="prepare", **config), linear)
            with torch.no_grad():
                for x_, t_ in zip(x.split(batches), t.split(batches), strict=True):
                    model(x_, t_)
            quantize_(model, dq_torchao.TimestepInt8Config(step="convert", **config), linear)
            models.append(model)
        with torch.no_grad():
            torch.testing.assert_close(models[0](x, t), models[1](x, t), atol=1e-5, rtol=1e-5)


def test_calibrating_by_sampling_sees_every_token_at_its_timestep():
    """The largest timestep of every sample is the same, as where the first frame is given and others are not."""
    from torchao.quantization import quantize_

    x, t, outputs = noise(B, B, seed=1), torch.tensor(TIMESTEPS).expand(B, B), []
    for layout in KNOWN:
        model = Layout(layout).eval().requires_grad_(False)
        config = {"groups": B, "recipe": "ranges"}
        linear = dq_torchao.linear_and_conv2d
        with torch.no_grad():
            quantize_(model, dq_torchao.TimestepInt8Config(step="prepare", **config), linear)
            model(x, t)
            quantize_(model, dq_torchao.TimestepInt8Config(step="convert", **config), linear)
            outputs.append(model(x, t))
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0], atol=1e-5, rtol=1e-5)
