"""Tokens of one call at several timesteps: every one counts at its own, in whatever layout a layer sees it."""

import pytest
import torch
from row_layouts import ORDERS, TIMESTEPS, Layout, noise, token_timesteps

import dq_plugins as dq
from dq_plugins.errors import TimestepError
from dq_plugins.graph.row_order import find_row_orders
from dq_plugins.observers import observe_groups
from dq_plugins.observers.minmax import MinMaxObserver
from dq_plugins.recipe import Recipe, Step

B = 3
KNOWN = [layout for layout, order in ORDERS.items() if order != "mixed"]
SIZES = [B, 2 * B, 2 * B + 1]
"""Tokens of a sample: as many as samples, a multiple of that, and neither."""


OPEN = {
    "B S C": ([B], [B]),
    "(B S) C": (SIZES, SIZES),
    "(S B) C": (SIZES, SIZES),
    "S B C": ([B, 2 * B], [B]),
}
"""Where the shape does not say which rows are whose; with the same timesteps in all samples, it says more."""


def recorded(layout, tokens, folder, *, same=False):
    def sample(denoiser):
        for seed in range(2):
            denoiser(noise(B, tokens, seed), token_timesteps(B, tokens, same=same))

    model = Layout(layout).eval().requires_grad_(False)
    return model, dq.record(model, sample, folder, progress=False)


def orders_of(model, calibration):
    return find_row_orders(model, calibration.example_inputs(), "timestep", "sample", ["enter", "middle", "leave"])


def observed(model, calibration, orders):
    found = observe_groups(model, calibration, ["middle"], lambda _: MinMaxObserver(symmetric=False), orders=orders)
    return torch.stack(found["middle"])  # [2, G]


@torch.no_grad()
def expected(model, tokens, *, same=False):
    x = torch.cat([model.enter(noise(B, tokens, seed)) for seed in range(2)])
    t = token_timesteps(B, tokens, same=same).repeat(2, 1)
    seen = [x[t == each] * (1 + each / 10) for each in sorted(TIMESTEPS)]
    return torch.tensor([[float(each.min()) for each in seen], [float(each.max()) for each in seen]])


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("layout", KNOWN)
def test_observers_see_every_token_at_its_timestep(layout, tokens, tmp_path):
    model, calibration = recorded(layout, tokens, tmp_path)
    orders = orders_of(model, calibration)
    torch.testing.assert_close(observed(model, calibration, orders), expected(model, tokens))


@pytest.mark.parametrize("same", [False, True], ids=["", "same in all samples"])
@pytest.mark.parametrize("layout", KNOWN)
def test_without_the_order_they_do_or_it_is_an_error(layout, same, tmp_path):
    refused = []
    for tokens in SIZES:
        model, calibration = recorded(layout, tokens, tmp_path / str(tokens), same=same)
        try:
            found = observed(model, calibration, {})
        except TimestepError:
            refused.append(tokens)
        else:
            torch.testing.assert_close(found, expected(model, tokens, same=same))
    assert refused == OPEN[layout][same]


@pytest.mark.parametrize("tokens", SIZES)
def test_a_plan_from_chosen_timesteps_is_that_of_any_other_layout(tokens, tmp_path):
    """The search over calls, and an observer of ranges: they see the same values at the same timesteps."""
    passes = ("weight-ranges", "calibration-timesteps", "timestep-groups", "activation-ranges")
    recipe = Recipe("r", "", tuple(Step(name) for name in passes))
    options = {
        "calibration-timesteps": {"groups": 2},
        "timestep-groups": {"groups": 2},
        "activation-ranges": {"observer": "minmax"},
    }
    plans = []
    for layout in KNOWN:
        model, calibration = recorded(layout, tokens, tmp_path / f"{ORDERS[layout]} {layout.count('(')}")
        plans.append(dq.make_plan(model, calibration, recipe, options=options, progress=False))
    for plan in plans[1:]:
        assert plan.calibration_calls.visits == plans[0].calibration_calls.visits
        assert plan.groups == plans[0].groups
        assert torch.equal(plan.layers["middle"].activation.scale, plans[0].layers["middle"].activation.scale)
