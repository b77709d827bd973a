from itertools import pairwise

import pytest
import torch
from denoisers import recorded, tiny_denoiser
from torch import Tensor, nn

import dq_plugins as dq
from dq_plugins.affine import affine_parameters
from dq_plugins.recipe import Recipe, Step

SCHEDULE = tuple(float(t) for t in range(951, 0, -50))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    return denoiser, recorded(denoiser, tmp_path_factory.mktemp("calib"), schedule=SCHEDULE)


def plan_with(case, groups: int, *, method: str = "dp", observer: str = "mse", act_bits: int = 8) -> dq.QuantPlan:
    recipe = Recipe(
        "r",
        "",
        (
            Step("weight-ranges"),
            Step("timestep-groups", {"groups": groups, "method": method}),
            Step("activation-ranges", {"observer": observer}),
        ),
    )
    return dq.make_plan(*case, recipe, act_bits=act_bits, edge_bits=2, progress=False)


def inputs_of(case) -> dict[str, dict[float, Tensor]]:
    """Every input of every layer, by timestep."""
    denoiser, calibration = case
    seen: dict[str, dict[float, list[Tensor]]] = {}
    current = [0.0]
    hooks = [
        module.register_forward_pre_hook(
            lambda _m, args, n=name: seen.setdefault(n, {}).setdefault(current[0], []).append(args[0].flatten())
        )
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    for t in calibration.timesteps:
        current[0] = t
        for call in calibration.calls(t):
            call.run(denoiser)
    for hook in hooks:
        hook.remove()
    return {n: {t: torch.cat(x) for t, x in by_t.items()} for n, by_t in seen.items()}


def relative_errors(case, plan: dq.QuantPlan) -> dict[str, float]:
    found = {}
    for name, by_t in inputs_of(case).items():
        quant = plan.layers[name].activation
        group = plan.groups[quant.groups].of
        noise = sum((quant.fake_quantize(x, group(t)) - x).double().square().sum() for t, x in by_t.items())
        found[name] = float(noise / sum(x.double().square().sum() for x in by_t.values()))
    return found


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_eight_groups_lower_the_error_of_every_layer_that_moves_and_raise_none(case, bits: int) -> None:
    static, grouped = (relative_errors(case, plan_with(case, g, act_bits=bits)) for g in (1, 8))
    ranges = {n: [float(x.abs().max()) for x in by_t.values()] for n, by_t in inputs_of(case).items()}
    moving = {n for n, r in ranges.items() if max(r) > 2 * min(r)}
    assert len(moving) >= 5
    for name in static:
        assert grouped[name] <= static[name] * (1 + 1e-6), name
        if name in moving:
            assert grouped[name] < 0.97 * static[name], name


def test_one_group_equals_the_static_quantizer_bit_for_bit(case) -> None:
    denoiser, _ = case
    plan = plan_with(case, 1, observer="minmax")
    everything = {n: torch.cat(list(by_t.values())) for n, by_t in inputs_of(case).items()}
    for name, x in everything.items():
        scale, zero_point = affine_parameters(x.min(), x.max(), 8, symmetric=False)
        assert torch.equal(plan.layers[name].activation.scale, scale.reshape(1))
        assert torch.equal(plan.layers[name].activation.zero_point, zero_point.reshape(1))
    model = dq.apply(denoiser, plan, backend="simulate")
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([501.0, 501.0])
    assert torch.equal(model(x, t), dq.apply(denoiser, plan, backend="simulate")(x, torch.tensor([501.0])))


def test_minmax_covers_every_recorded_value(case) -> None:
    plan = plan_with(case, 5, method="uniform", observer="minmax")
    for name, by_t in inputs_of(case).items():
        quant = plan.layers[name].activation
        for t, x in by_t.items():
            group = plan.groups["default"].of(t)
            assert (quant.fake_quantize(x, group) - x).abs().max() <= quant.scale[group] * 1.001, name


def test_optimal_groups_are_at_least_as_good_as_uniform_ones(case) -> None:
    uniform, optimal = (
        sum(relative_errors(case, plan_with(case, 4, method=m, act_bits=4)).values()) for m in ("uniform", "dp")
    )
    assert optimal <= uniform * 1.001


def test_the_curve_falls_and_stays_in_the_plan(case) -> None:
    curve = plan_with(case, 8, act_bits=4).sections["timestep-groups"].data["relative_error"]
    assert len(curve) == len(SCHEDULE)
    assert all(a >= b for a, b in pairwise(curve))
    assert curve[0] > 1.2 * curve[7]


def test_registered_observers_can_be_named(case) -> None:
    plan = plan_with(case, 3, observer="percentile")
    assert all(layer.activation is not None for layer in plan.layers.values())


def test_no_activation_bits_leaves_activations_alone(case) -> None:
    plan = dq.make_plan(*case, "default", act_bits=None, progress=False)
    assert all(layer.activation is None and "as asked" in layer.why for layer in plan.layers.values())


def test_by_width_cuts_nothing_off_at_eight_bits_and_errs_least_below(case) -> None:
    def ranges(observer: str, act_bits: int) -> dict[str, torch.Tensor]:
        recipe = Recipe("r", "", (Step("weight-ranges"), Step("activation-ranges", {"observer": observer})))
        plan = dq.make_plan(*case, recipe, act_bits=act_bits, edge_bits=8, progress=False)
        return {name: layer.activation.scale for name, layer in plan.layers.items()}

    narrow, least, widest = (ranges(observer, 4) for observer in ("by-width", "mse", "minmax"))
    inner = [name for name in narrow if name not in ("enter", "leave")]
    assert all(torch.equal(narrow[name], least[name]) for name in inner)
    assert any(not torch.equal(widest[name], least[name]) for name in inner)
    wide, widest = (ranges(observer, 8) for observer in ("by-width", "minmax"))
    assert all(torch.equal(wide[name], widest[name]) for name in wide)
