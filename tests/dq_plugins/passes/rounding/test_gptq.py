from __future__ import annotations

import copy

import pytest
import torch
from denoisers import TinyDenoiser, recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.hooks import hooked
from dq_plugins.passes.rounding import gptq
from dq_plugins.progress import finish
from dq_plugins.recipe import PassContext, Recipe, Step


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    return denoiser, recorded(denoiser, tmp_path_factory.mktemp("calib"), batch=4)


def make(case, *steps: Step, **options) -> dq.QuantPlan:
    recipe = Recipe("r", "", (Step("weight-ranges"), *steps))
    usual = {"weight_bits": 3, "act_bits": None, "edge_bits": 3, "progress": False}
    return dq.make_plan(*case, recipe, **usual | options)


def errors(case, plan: dq.QuantPlan) -> dict[str, float]:
    """Error of each layer's output over its power, on the inputs that full precision gives it."""
    denoiser, calibration = case
    modules = {name: denoiser.get_submodule(name) for name in plan.layers}
    totals = {name: [0.0, 0.0] for name in modules}

    def compare(name, args, kwargs, output):
        module = modules[name]
        fake = plan.layers[name].weight.fake_quantize(module.weight)
        other = type(module).forward(copy_with(module, fake), *args)
        totals[name][0] += float((other - output).square().mean())
        totals[name][1] += float(output.square().mean())

    with hooked(modules, after=compare), torch.no_grad():
        for call in calibration.calls():
            call.run(denoiser)
    return {name: error / power for name, (error, power) in totals.items()}


def copy_with(module, weight):
    other = copy.deepcopy(module)
    other.weight = torch.nn.Parameter(weight, requires_grad=False)
    return other


def gain(case, plan: dq.QuantPlan, other: dq.QuantPlan) -> float:
    """Mean over layers of the error of one plan over that of another."""
    one, two = errors(case, plan), errors(case, other)
    return sum(one[name] / two[name] for name in one) / len(one)


@pytest.mark.parametrize("bits", [3, 4])
def test_output_error_falls_far_below_nearest_rounding(case, bits) -> None:
    plan = make(case, Step("gptq"), weight_bits=bits)
    assert gain(case, plan, make(case, weight_bits=bits)) < 0.6


def test_asymmetric_weights_keep_their_zero_points(case) -> None:
    steps = Step("weight-ranges"), Step("gptq")
    plan = dq.make_plan(
        *case, Recipe("r", "", steps), weight_bits=3, act_bits=None, symmetric_weights=False, progress=False
    )
    assert all(layer.weight.zero_point is not None for layer in plan.layers.values())
    assert gain(case, plan, make(case)) < 0.8


def test_scales_can_be_left_as_they_are(case) -> None:
    before, after = make(case), make(case, Step("gptq", {"scales": False}))
    for name, layer in after.layers.items():
        assert torch.equal(layer.weight.scale, before.layers[name].weight.scale)
    assert gain(case, after, before) < 0.8


def test_wider_weights_keep_their_rounding(case) -> None:
    plan = make(case, Step("gptq", {"most_bits": 2}))
    assert all(layer.weight.codes is None for layer in plan.layers.values())


def test_little_memory_means_more_sweeps_and_as_good_a_plan(case, monkeypatch) -> None:
    sweeps = []
    inputs = gptq.GPTQ._inputs
    monkeypatch.setattr(
        gptq.GPTQ, "_inputs", lambda *args, **options: sweeps.append(args[1]) or inputs(*args, **options)
    )
    monkeypatch.setattr(gptq, "MEBIBYTE", 1024)
    plan = make(case, Step("gptq", {"memory_mb": 32}))
    assert len(sweeps) > 1
    assert sorted(name for chunk in sweeps for name in chunk) == sorted(plan.layers)
    assert gain(case, plan, make(case)) < 0.6


def test_the_same_seed_gives_the_same_plan(case) -> None:
    few = Step("gptq", {"rows": 16})
    assert make(case, few) == make(case, few)
    assert make(case, few, seed=1) != make(case, few)


@pytest.mark.parametrize("act_bits", [None, 8])  # with the statistics of ranges in the first sweep, or without
def test_resumes_sweep_by_sweep_to_the_same_plan(case, tmp_path, monkeypatch, act_bits) -> None:
    monkeypatch.setattr(gptq, "MEBIBYTE", 1)  # a sweep for each layer
    form = {"act_bits": act_bits}
    whole, measure, swept = make(case, Step("gptq", {"memory_mb": 16, "calls": 3}), **form), gptq.GPTQ._inputs, []

    def interrupted_after(sweeps: int):
        def inputs(self, names, plan, context, **options):
            if len(swept) == sweeps:
                raise KeyboardInterrupt
            swept.append(names)
            return measure(self, names, plan, context, **options)

        return inputs

    with monkeypatch.context() as patch:
        patch.setattr(gptq.GPTQ, "_inputs", interrupted_after(2))
        with pytest.raises(KeyboardInterrupt):
            make(case, Step("gptq", {"memory_mb": 16, "calls": 3}), workdir=tmp_path, **form)
    assert len(list((tmp_path / "01-gptq").iterdir())) == 2
    monkeypatch.setattr(gptq.GPTQ, "_inputs", interrupted_after(99))
    assert make(case, Step("gptq", {"memory_mb": 16, "calls": 3}), workdir=tmp_path, **form) == whole
    assert len(swept) == len({tuple(names) for names in swept}) > 2


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    torch.manual_seed(0)
    denoiser = TinyDenoiser(width=32).eval().requires_grad_(False)
    for block in denoiser.body:
        for layer in (block.alpha, block.gamma):
            layer.weight[:, :8] *= 6  # one group of inputs meets larger weights
    return denoiser, recorded(denoiser, tmp_path_factory.mktemp("wide"), batch=4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_inputs_keep_scales_of_their_own_and_lower_the_error(wide, symmetric) -> None:
    form = {"symmetric_weights": symmetric}
    plan = make(wide, Step("gptq", {"memory_mb": 16}), weight_group_size=8, **form)
    grouped = {name for name, layer in plan.layers.items() if layer.weight.group_scale is not None}
    assert grouped == {n for n in plan.layers if wide[0].get_submodule(n).weight.shape[1] > 8}
    assert gain(wide, plan, make(wide, Step("gptq", {"memory_mb": 16}), **form)) < 0.95
    assert gain(wide, plan, make(wide, weight_group_size=8, **form)) < 0.8


def test_learned_rounding_and_learned_scales_keep_the_groups(wide) -> None:
    steps = Step("weight-ranges"), Step("timestep-groups", {"groups": 1}), Step("activation-ranges")
    learn = Step("block-reconstruction", {"iterations": 4}), Step("learned-ranges", {"passes": 0.2})
    recipe = Recipe("r", "", (*steps, *learn))
    plan = dq.make_plan(*wide, recipe, weight_bits=3, act_bits=8, weight_group_size=8, progress=False)
    weights = [layer.weight for layer in plan.layers.values()]
    assert any(weight.group_scale is not None and weight.codes is not None for weight in weights)
    call = next(iter(wide[1].calls()))
    with torch.no_grad():
        found, expected = (call.run(dq.apply(copy.deepcopy(wide[0]), plan, backend=b)) for b in ("torchao", "simulate"))
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_the_statistics_of_ranges_come_in_the_same_sweep(case) -> None:
    denoiser, calibration = case
    calls = []

    def made(*steps: Step) -> tuple[dq.QuantPlan, int]:
        calls.clear()
        with hooked({"": denoiser}, before=lambda *call: calls.append(call[0])):
            recipe = Recipe("r", "", (Step("weight-ranges"), *steps, Step("activation-ranges")))
            plan = dq.make_plan(denoiser, calibration, recipe, weight_bits=3, act_bits=8, progress=False)
        return plan, len(calls)

    plan, swept = made(Step("gptq", {"memory_mb": 16}))
    assert swept == made()[1] > 0
    assert gain(case, plan, make(case)) < 0.6


def test_it_limits_the_samples_that_statistics_are_of_also_after_an_interruption(case, tmp_path, monkeypatch) -> None:
    denoiser, calibration = case
    steps = (Step("weight-ranges"), Step("gptq", {"statistics_samples": 1}), Step("activation-ranges"))
    samples = []

    def made(**options) -> dq.QuantPlan:
        samples.clear()
        with hooked({"": denoiser}, before=lambda _, args, kwargs: samples.append(len(kwargs["sample"]))):
            return dq.make_plan(denoiser, calibration, Recipe("r", "", steps), progress=False, **options)

    plan = made()
    assert samples.count(1) >= len(calibration)  # one of every call, and the probes of tracing

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dq_plugins.passes.ranges.activation_ranges.ActivationRanges.run", fail)
        with pytest.raises(KeyboardInterrupt):
            made(workdir=tmp_path)
    assert made(workdir=tmp_path) == plan


def test_a_layer_that_no_call_reaches_keeps_its_rounding(case) -> None:
    denoiser, calibration = case
    context = PassContext(denoiser, calibration)
    plan = make(case)
    name = next(iter(plan.layers))
    before = plan.layers[name].weight
    with pytest.MonkeyPatch.context() as patch:
        inputs = gptq.GPTQ._inputs

        def without_it(*args, **options):
            return {n: x for n, x in inputs(*args, **options).items() if n != name}

        patch.setattr(gptq.GPTQ, "_inputs", without_it)
        finish(gptq.GPTQ().run(plan, context))
    assert plan.layers[name].weight == before
    assert all(layer.weight.codes is not None for other, layer in plan.layers.items() if other != name)
