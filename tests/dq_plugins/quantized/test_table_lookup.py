import copy

import pytest
import torch
from denoisers import SCHEDULE, example, recorded, tiny_denoiser
from torch import nn

import dq_plugins as dq
from dq_plugins.errors import TimestepError
from dq_plugins.passes.temporal.temporal_table import TemporalTable
from dq_plugins.quantized.table_lookup import NotComputed, TableLookup, quantize_rows
from dq_plugins.recipe import Recipe, Step

X = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def tabulated(tmp_path_factory):
    """A denoiser and a plan that does nothing but tabulate."""
    denoiser = tiny_denoiser()
    calibration = recorded(denoiser, tmp_path_factory.mktemp("calib"))

    def make(**options):
        recipe = Recipe("table", "only the table", (Step("temporal-table", options),))
        return dq.make_plan(denoiser, calibration, recipe, progress=False)

    return denoiser, make


def test_equals_the_full_precision_denoiser_bit_for_bit(tabulated) -> None:
    denoiser, make = tabulated
    model = dq.apply(denoiser, make(), backend="simulate")
    for t in SCHEDULE:  # two samples, as in the recorded calls: another batch size may round its products differently
        assert torch.equal(model(X, torch.tensor([t, t])), denoiser(X, torch.tensor([t, t])))
        torch.testing.assert_close(model(X[:1], torch.tensor([t])), denoiser(X[:1], torch.tensor([t])))


def test_weights_of_the_block_leave_the_model(tabulated) -> None:
    denoiser, make = tabulated
    model = dq.apply(denoiser, make(), backend="simulate")
    assert isinstance(model.p, NotComputed)
    assert isinstance(model.body[0].beta, TableLookup)
    removed = sum(denoiser.get_submodule(n).weight.numel() for n in ("p", "q", "body.0.beta", "body.1.beta"))
    biases = sum(denoiser.get_submodule(n).bias.numel() for n in ("p", "q", "body.0.beta", "body.1.beta"))
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(denoiser) - count(model) == removed + biases


def test_code_that_reads_sizes_of_a_layer_still_can(tabulated) -> None:
    denoiser, make = tabulated
    model = dq.apply(denoiser, make(), backend="simulate")
    for name in ("p", "q", "body.0.beta"):
        found, layer = model.get_submodule(name), denoiser.get_submodule(name)
        assert (found.in_features, found.out_features) == (layer.in_features, layer.out_features)


def test_per_sample_timesteps_take_their_own_rows(tabulated) -> None:
    denoiser, make = tabulated
    model = dq.apply(denoiser, make(), backend="simulate")
    t = torch.tensor([SCHEDULE[0], SCHEDULE[3]])
    torch.testing.assert_close(model(X, t), denoiser(X, t))


def test_a_timestep_outside_the_table_is_an_error(tabulated) -> None:
    denoiser, make = tabulated
    model = dq.apply(denoiser, make(), backend="simulate")
    with pytest.raises(TimestepError, match=r"500 is not in the temporal table.*nearest: 501"):
        model(X, torch.tensor([500.0, 500.0]))


def test_live_fallback_computes_timesteps_outside_the_table(tabulated) -> None:
    denoiser, make = tabulated
    model = dq.apply(denoiser, make(), backend="simulate", temporal_fallback="live")
    for t in (500.0, SCHEDULE[1]):
        torch.testing.assert_close(model(X, torch.tensor([t, t])), denoiser(X, torch.tensor([t, t])))


def test_compiled_lookup_follows_t_and_is_loud_outside_the_table(tabulated) -> None:
    denoiser, make = tabulated
    model = dq.apply(denoiser, make(), backend="simulate")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for t in SCHEDULE:
            torch.testing.assert_close(compiled(X, torch.tensor([t, t])), denoiser(X, torch.tensor([t, t])))
        assert compiled(X, torch.tensor([500.0, 500.0])).isnan().all()


def test_int8_rows_are_close_and_small(tabulated) -> None:
    denoiser, make = tabulated
    plan = make(storage="int8")
    assert all(each.rows.dtype == torch.int8 for each in plan.temporal_table.outputs.values())
    model, t = dq.apply(denoiser, plan, backend="simulate"), torch.tensor([501.0])
    assert (model(X[:1], t) - denoiser(X[:1], t)).abs().max() < 0.02 * denoiser(X[:1], t).abs().max()


def test_quantized_rows_are_within_half_a_step() -> None:
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 5)[:, None]
    codes, scale = quantize_rows(rows)
    assert ((codes * scale[:, None] - rows).abs() <= scale[:, None] * 0.5001).all()


def test_plan_with_a_table_reloads_and_gives_the_same_output(tabulated, tmp_path) -> None:
    denoiser, make = tabulated
    plan = make()
    loaded = dq.QuantPlan.load(plan.save(tmp_path))
    t = torch.tensor([SCHEDULE[2]])
    first, second = (dq.apply(denoiser, p, backend="simulate")(X[:1], t) for p in (plan, loaded))
    assert torch.equal(first, second)


def test_a_copy_of_the_model_looks_up_on_its_own(tabulated) -> None:
    denoiser, make = tabulated
    model = dq.apply(denoiser, make(), backend="simulate")
    copied = copy.deepcopy(model)
    a, b = torch.tensor([SCHEDULE[0]]), torch.tensor([SCHEDULE[4]])
    assert torch.equal(copied(X[:1], b), model(X[:1], b))
    assert not torch.equal(copied(X[:1], a), model(X[:1], b))
    assert isinstance(copied.p, nn.Module)
    assert example()


class LooksTimeUp(nn.Module):
    """The timestep is an index of a table, and its block goes on in 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1001, 6)
        self.mix, self.film = nn.Conv2d(6, 5, 1), nn.ConvTranspose2d(5, 4, 1)
        self.enter, self.leave = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, sample, timestep):
        e = nn.functional.silu(self.table(timestep.long()))[..., None, None]
        e = nn.functional.silu(self.mix(e)) + 1
        return self.leave(nn.functional.silu(self.enter(sample) + self.film(e)))


def test_layers_of_every_kind_can_be_left_out(tmp_path) -> None:
    torch.manual_seed(0)
    denoiser = LooksTimeUp().eval().requires_grad_(False)
    recipe = Recipe("table", "only the table", (Step("temporal-table"),))
    plan = dq.make_plan(denoiser, recorded(denoiser, tmp_path), recipe, progress=False)
    model = dq.apply(denoiser, plan, backend="simulate")
    assert isinstance(model.table, NotComputed)
    assert isinstance(model.mix, NotComputed)
    t = torch.full((2,), SCHEDULE[1])
    assert torch.equal(model(X, t), denoiser(X, t))
    assert model.table(t.long()).shape == (2, 6)
    assert model.mix(torch.zeros(2, 6, 1, 1)).shape == (2, 5, 1, 1)


@pytest.mark.parametrize(("weight_bits", "dtype"), [(2, torch.int8), (None, torch.float32)])
def test_auto_takes_int8_rows_only_where_the_quantized_block_disturbs_more(tabulated, tmp_path, weight_bits, dtype):
    denoiser, _ = tabulated
    before = () if weight_bits is None else (Step("weight-ranges"),)
    recipe = Recipe("auto", "", (*before, Step("temporal-table", {"storage": "auto"})))
    plan = dq.make_plan(denoiser, recorded(denoiser, tmp_path), recipe, weight_bits=weight_bits or 8, progress=False)
    assert set(plan.temporal_table.outputs) == {"body.0.beta", "body.1.beta"}
    assert {each.rows.dtype for each in plan.temporal_table.outputs.values()} == {dtype}


@pytest.mark.parametrize("weight_bits", [2, None])
def test_selected_leaves_what_the_block_computes_with_less_disturbance_to_it(tabulated, tmp_path, weight_bits):
    denoiser, make = tabulated
    if weight_bits is None:  # in full precision nothing disturbs less than the block
        plan = make(storage="selected")
        assert plan.temporal_table is None
        assert "disturbs every feature less" in plan.sections["temporal-table"].data["skipped"]
        return
    recipe = Recipe("selected", "", (Step("weight-ranges"), Step("temporal-table", {"storage": "selected"})))
    plan = dq.make_plan(denoiser, recorded(denoiser, tmp_path), recipe, weight_bits=weight_bits, progress=False)
    assert {each.rows.dtype for each in plan.temporal_table.outputs.values()} == {torch.int8}
    assert set(plan.temporal_table.not_computed) == {"p", "q"}


def test_a_feature_that_is_still_computed_keeps_what_feeds_it(tabulated, tmp_path, monkeypatch):
    denoiser, _ = tabulated
    monkeypatch.setattr(TemporalTable, "_int8", lambda *_: frozenset({"body.0.beta"}))
    recipe = Recipe("selected", "", (Step("weight-ranges"), Step("temporal-table", {"storage": "selected"})))
    plan = dq.make_plan(denoiser, recorded(denoiser, tmp_path), recipe, weight_bits=8, progress=False)
    assert set(plan.temporal_table.outputs) == {"body.0.beta"}
    assert plan.layers["body.1.beta"].weight is not None
    assert plan.layers["q"].weight is not None
    model = dq.apply(denoiser, plan, backend="simulate")
    t = torch.full((2,), SCHEDULE[1])
    torch.testing.assert_close(model(X, t), denoiser(X, t), rtol=0.1, atol=0.1)
