import copy

import pytest
import torch
from denoisers import SCHEDULE, recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.affine import affine_parameters, fake_quantize, integer_range
from dq_plugins.passes.temporal.block import temporal_block
from dq_plugins.passes.temporal.finite_set import finite_set
from dq_plugins.passes.temporal.finite_set_ranges import GROUPS, exact_ranges
from dq_plugins.recipe import Recipe, Step


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    calibration = recorded(denoiser, tmp_path_factory.mktemp("calib"))
    recipe = Recipe("test", "", (Step("weight-ranges"), Step("finite-set-ranges", {"quantized_weights": False})))
    plan = dq.make_plan(denoiser, calibration, recipe, act_bits=4, progress=False)
    return denoiser, calibration, plan


def layer_inputs(denoiser: torch.nn.Module, name: str, t: float) -> torch.Tensor:
    seen = []
    hook = denoiser.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    denoiser(torch.randn(2, 2, 8, 8), torch.tensor([t, t]))
    hook.remove()
    return seen[0]


def test_one_parameter_set_per_timestep_of_the_schedule(case) -> None:
    _, _, plan = case
    assert len(plan.groups[GROUPS]) == len(SCHEDULE)
    for name in ("p", "q", "body.0.beta", "body.1.beta"):
        assert plan.layers[name].activation.scale.shape == (len(SCHEDULE),)
    assert plan.layers["enter"].activation is None


def test_ranges_are_those_the_layers_see(case) -> None:
    denoiser, calibration, _ = case
    block = temporal_block(denoiser, calibration.example_inputs())
    ranges = exact_ranges(block, finite_set(block, SCHEDULE), {})
    for name, bounds in ranges.items():
        for row, t in enumerate(SCHEDULE):
            x = layer_inputs(denoiser, name, t)
            torch.testing.assert_close(bounds[row], torch.stack([x.min(), x.max()]))


def test_error_at_four_bits_is_below_a_shared_range(case) -> None:
    denoiser, _, plan = case
    own = shared = 0.0
    for name in ("q", "body.0.beta", "body.1.beta"):
        inputs = {t: layer_inputs(denoiser, name, t) for t in SCHEDULE}
        every = torch.cat(list(inputs.values()))
        scale, zero_point = affine_parameters(every.min(), every.max(), 4, symmetric=False)
        for t, x in inputs.items():
            own += (plan.layers[name].activation.fake_quantize(x, plan.groups[GROUPS].of(t)) - x).square().sum()
            shared += (fake_quantize(x, scale, zero_point, *integer_range(4)) - x).square().sum()
    assert own < shared


def test_switching_the_timestep_touches_nothing_outside_its_row(case) -> None:
    denoiser, _, plan = case
    model = dq.apply(denoiser, plan, backend="simulate")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = {t: model(x, torch.tensor([t, t])) for t in SCHEDULE}
    for name in ("p", "q", "body.0.beta", "body.1.beta"):
        model.get_submodule(name).input_quantizer.scale[plan.groups[GROUPS].of(SCHEDULE[1])] *= 3
    for t in SCHEDULE:
        same = torch.equal(model(x, torch.tensor([t, t])), outputs[t])
        assert same == (t != SCHEDULE[1])
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert all(k.endswith("input_quantizer.scale") for k in changed)


def test_exceptions_of_the_paper_stay_in_full_precision_and_say_so(case) -> None:
    denoiser, calibration, _ = case
    keep = {"keep_roles": ("first", "last", "temporal_first")}
    steps = (Step("weight-ranges", keep), Step("activation-ranges"), Step("finite-set-ranges"))
    plan = dq.make_plan(denoiser, calibration, Recipe("r", "", steps), progress=False)
    kept = {name for name, layer in plan.layers.items() if layer.width == "full precision"}
    assert kept == {"enter", "leave", "p"}
    assert all("role" in plan.layers[name].why for name in kept)
    assert plan.layers["q"].activation.groups == GROUPS


def test_ranges_are_those_behind_the_planned_weights_unless_told_otherwise(tmp_path) -> None:
    denoiser = tiny_denoiser()
    calibration = recorded(denoiser, tmp_path)
    spans = {}
    for quantized in (True, False):
        steps = Step("weight-ranges"), Step("finite-set-ranges", {"quantized_weights": quantized})
        options = {"weight_bits": 3, "act_bits": 8, "progress": False}
        plan = dq.make_plan(denoiser, calibration, Recipe("r", "", steps), **options)
        spans[quantized] = 255 * plan.layers["q"].activation.scale
    coarse = copy.deepcopy(denoiser)
    coarse.p.weight.copy_(plan.layers["p"].weight.fake_quantize(denoiser.p.weight))
    for quantized, model in ((True, coarse), (False, denoiser)):
        for row, t in enumerate(sorted(SCHEDULE)):
            x = layer_inputs(model, "q", t)
            torch.testing.assert_close(spans[quantized][row], x.max() - x.min())
    assert not torch.allclose(spans[True], spans[False], rtol=0.01)
