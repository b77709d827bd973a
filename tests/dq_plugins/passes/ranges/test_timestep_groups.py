import pytest
import torch
from denoisers import loud_where_it_does_not_matter, recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.errors import RecipeError
from dq_plugins.passes.ranges import searched_groups
from dq_plugins.passes.ranges.search import learn
from dq_plugins.passes.ranges.search.learn import learn_groups
from dq_plugins.passes.ranges.search.relaxation import start_logits
from dq_plugins.passes.ranges.searched_groups import FoundGroups, GroupSearch
from dq_plugins.passes.ranges.timestep_groups import TimestepGrouping
from dq_plugins.recipe import Recipe, Step

SCHEDULE = tuple(float(t) for t in range(901, 0, -100))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    return denoiser, recorded(denoiser, tmp_path_factory.mktemp("calib"), schedule=SCHEDULE)


def plan_with(case, observer: str = "mse", workdir=None, **options) -> dq.QuantPlan:
    steps = Step("timestep-groups", {"groups": 3, **options}), Step("activation-ranges", {"observer": observer})
    recipe = Recipe("r", "", (Step("weight-ranges"), *steps))
    return dq.make_plan(*case, recipe, act_bits=4, progress=False, workdir=workdir)


@pytest.fixture(scope="module")
def searched(case) -> dq.QuantPlan:
    return plan_with(case, method="search", rounds=6)


def output_error(case, plan: dq.QuantPlan) -> float:
    model = dq.apply(case[0], plan, backend="simulate")
    noise = sum(float((call.run(model) - call.output).square().sum()) for call in case[1].calls())
    return noise / sum(float(call.output.square().sum()) for call in case[1].calls())


def test_searched_groups_are_no_worse_than_uniform_ones_and_far_better_than_one_range(case, searched) -> None:
    static, uniform = (output_error(case, plan_with(case, **o)) for o in ({"groups": 1}, {"method": "uniform"}))
    assert output_error(case, searched) <= min(0.9 * static, 1.001 * uniform)


def test_the_plan_says_what_was_compared_and_kept(searched) -> None:
    found = searched.sections["timestep-groups"].data["search"]
    assert found["error"][found["kept"]] == min(found["error"].values())
    assert set(found["error"]) == {"search", "search, ranges of least error", "dp", "uniform"}
    assert len(searched.groups["default"]) <= 3


def test_the_figure_shows_the_error_for_every_number_of_groups(case, searched) -> None:
    figure, _ = TimestepGrouping.figure(searched)
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == list(range(1, len(SCHEDULE) + 1))
    assert line.get_ydata()[-1] < line.get_ydata()[0]
    assert TimestepGrouping.figure(plan_with(case, method="uniform")) is None


@pytest.mark.parametrize("loss", ["input", "layer", "block"])
@pytest.mark.parametrize("start", ["dp", "scratch"])
def test_other_losses_and_starts_give_a_valid_plan(case, loss: str, start: str) -> None:
    plan = plan_with(case, method="search", loss=loss, start=start, rounds=3, keep_better=False)
    assert plan.sections["timestep-groups"].data["search"]["kept"] == "search"


def test_a_start_from_the_dynamic_program_begins_with_its_groups(case, monkeypatch) -> None:
    started = []
    monkeypatch.setattr(
        searched_groups,
        "start_logits",
        lambda shape, labels, g: started.append(labels) or start_logits(shape, labels, g),
    )
    plan_with(case, method="search", loss="input", start="dp", rounds=1)
    groups = plan_with(case, method="dp").groups["default"]
    optimal, uniform = [groups.of(t) for t in sorted(SCHEDULE)], [i * 3 // len(SCHEDULE) for i in range(len(SCHEDULE))]
    assert started[0].tolist() == [optimal]
    assert optimal != uniform


def test_the_loss_counts_against_what_the_option_names(case, monkeypatch) -> None:
    scales = []
    monkeypatch.setattr(
        searched_groups, "learn_groups", lambda *a, scale, **o: scales.append(scale) or learn_groups(*a, **o)
    )
    options = {"method": "search", "loss": "input", "rounds": 1}
    plan_with(case, **options)
    plan_with(case, **options, entropy_scale="signal")
    one = plan_with(case, **{**options, "groups": 1}).sections["timestep-groups"].data["search"]
    assert scales[:2] == [pytest.approx(one["error"]["dp"]), 1.0]  # one static range; the signal's power


@pytest.mark.parametrize("method", ["dp", "search"])
def test_each_layer_may_have_groups_of_its_own(case, method: str) -> None:
    plan = plan_with(case, method=method, shared=False, loss="input", rounds=30)
    used = {layer.activation.groups for layer in plan.layers.values()}
    assert used == set(plan.layers)
    assert len({plan.groups[name].edges for name in used}) > 1
    shared = plan_with(case, method=method, loss="input", rounds=30)
    assert output_error(case, plan) < 2 * output_error(case, shared)


@pytest.mark.parametrize("observer", ["mse", "minmax", "percentile"])
def test_groups_that_are_no_runs_share_their_ranges(case, monkeypatch, observer: str) -> None:
    labels = torch.tensor([0, 0, 1, 1, 0, 0, 2, 2, 1, 1])
    found = FoundGroups({"default": labels}, {}, {})  # groups, and no learned ranges
    monkeypatch.setattr(GroupSearch, "_decide", lambda *_: found)
    options = {"method": "search", "loss": "input", "rounds": 2}
    plan = plan_with(case, observer, contiguous=False, **options)
    assert len(plan.groups["default"]) == 5
    for layer in plan.layers.values():
        assert layer.activation.scale[0] == layer.activation.scale[2]
        assert layer.activation.scale[1] == layer.activation.scale[4]
    assert len(set(plan.layers["enter"].activation.scale.tolist())) == 3


def test_the_same_seed_gives_the_same_plan_and_a_run_resumes_in_the_middle(
    case, searched, tmp_path, monkeypatch
) -> None:
    step = learn.take_step

    def failing(iteration: int, *args) -> None:
        if iteration == 40:
            raise KeyboardInterrupt
        step(iteration, *args)

    monkeypatch.setattr(learn, "take_step", failing)
    with pytest.raises(KeyboardInterrupt):
        plan_with(case, workdir=tmp_path, method="search", rounds=6)
    seen: list[int] = []
    monkeypatch.setattr(learn, "take_step", lambda i, *args: (seen.append(i), step(i, *args)))
    assert plan_with(case, workdir=tmp_path, method="search", rounds=6) == searched
    assert seen[0] == 25


def test_learned_ranges_are_deployed_and_activation_ranges_leaves_them(case) -> None:
    options = {"method": "search", "rounds": 6, "keep_better": False}
    plan, again = (plan_with(case, observer, **options) for observer in ("mse", "minmax"))
    assert plan.learned_ranges == frozenset(plan.layers)
    assert all(layer.unquantized_reason is None for layer in plan.layers.values())
    given = plan_with(case)  # the dynamic program's groups, ranges of least error
    for name, layer in plan.layers.items():
        assert torch.equal(layer.activation.scale, again.layers[name].activation.scale)
        assert not torch.isin(layer.activation.scale, given.layers[name].activation.scale).any()


def test_ranges_learned_against_the_output_leave_less_error_there_than_those_of_least_error_at_the_input(case) -> None:
    denoiser = loud_where_it_does_not_matter()
    planted = denoiser, recorded(denoiser, case[1].folder.parent / "planted", schedule=SCHEDULE)
    plan = plan_with(planted, method="search", rounds=16)
    found = plan.sections["timestep-groups"].data["search"]["error"]
    assert found["search"] < 0.8 * found["search, ranges of least error"]
    assert plan.sections["timestep-groups"].data["search"]["kept"] == "search"


def test_absolute_scale_needs_the_error_of_an_image(case) -> None:
    with pytest.raises(RecipeError, match="take loss='denoiser'"):
        plan_with(case, method="search", loss="block", entropy_scale="absolute")


def test_timesteps_in_any_order_and_guidance_in_one_batch_or_two_calls_agree(case, searched) -> None:
    model = dq.apply(case[0], searched, backend="simulate")
    calls = {t: case[1].call(t, 0) for t in case[1].timesteps}
    forwards = {t: call.run(model) for t, call in calls.items()}
    backwards = {t: calls[t].run(model) for t in reversed(case[1].timesteps)}
    for t, call in calls.items():
        assert torch.equal(forwards[t], backwards[t])
        halves = [call.rows(torch.tensor([i]), 2).run(model) for i in range(2)]
        assert torch.allclose(torch.cat(halves), forwards[t], atol=1e-5)
