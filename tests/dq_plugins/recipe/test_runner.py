from collections.abc import Iterator

import pytest
import torch
from denoisers import recorded, tiny_denoiser
from hidden_calls import Attention, recorded_sequence, sequence_denoiser
from torch import nn

import dq_plugins as dq
from dq_plugins import registry
from dq_plugins.errors import CalibrationError, DQError, PlanError, RecipeError
from dq_plugins.exclusive import exclusive
from dq_plugins.plan import Targets
from dq_plugins.recipe import Pass, PassOptions, Progress, Recipe, Step


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    return denoiser, recorded(denoiser, tmp_path_factory.mktemp("calib"))


class Counting(Pass):
    """Counts its runs, and can be told to fail."""

    name = "counting"
    runs = 0
    fail = False

    class Options(PassOptions):
        value: int = 1

    def run(self, plan, context) -> Iterator[Progress]:
        type(self).runs += 1
        yield Progress(0, 1)
        if type(self).fail:
            raise KeyboardInterrupt
        plan.sections[self.name] = dq.plan.Section({"value": self.options.value})


@pytest.fixture
def counting():
    Counting.runs, Counting.fail = 0, False
    with registry.temporary("pass", "counting", Counting):
        yield Counting


def test_same_call_same_plan_byte_for_byte(case, tmp_path) -> None:
    plans = [dq.make_plan(*case, "default", progress=False) for _ in range(2)]
    for name, plan in zip("ab", plans, strict=True):
        plan.save(tmp_path / name)
    for file in sorted(path.name for path in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_every_layer_is_listed_and_left_out_ones_say_why(case) -> None:
    denoiser, calibration = case
    plan = dq.make_plan(denoiser, calibration, Recipe("w", "", (Step("weight-ranges"),)), progress=False)
    weighted = {n for n, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert set(plan.layers) == weighted
    assert all(layer.unquantized_reason for layer in plan.layers.values())


def test_layers_that_cannot_be_quantized_are_listed_by_kind_too(tmp_path) -> None:
    denoiser = sequence_denoiser(Attention)
    denoiser.spare_up, denoiser.spare_table = nn.ConvTranspose1d(2, 2, 2), nn.Embedding(3, 4)
    recipe = Recipe("w", "", (Step("weight-ranges"),))
    plan = dq.make_plan(denoiser, recorded_sequence(denoiser, tmp_path), recipe, progress=False)
    kinds = {name: layer.kind for name, layer in plan.layers.items()}
    assert (kinds["middle.inner"], kinds["middle.inner.out_proj"]) == ("linear", "linear")
    assert (kinds["spare_up"], kinds["spare_table"]) == ("conv_transpose1d", "embedding")


def test_weights_are_untouched_and_gradients_restored(case, tmp_path) -> None:
    denoiser = tiny_denoiser(3)
    denoiser.enter.weight.requires_grad_(True)
    denoiser.train()
    calibration = recorded(denoiser, tmp_path)
    before = {k: v.clone() for k, v in denoiser.state_dict().items()}
    dq.make_plan(denoiser, calibration, "tfmq", options={"temporal-reconstruction": {"iterations": 5}}, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in denoiser.state_dict().items())
    assert denoiser.enter.weight.requires_grad
    assert not denoiser.leave.weight.requires_grad
    assert denoiser.training


def test_passes_draw_from_streams_of_their_own(case) -> None:
    class First(Pass):
        name = "first-draw"

        def run(self, plan, context) -> None:
            plan.sections[self.name] = dq.plan.Section({"draw": float(torch.rand((), generator=context.generator()))})

    class Second(First):
        name = "second-draw"

    with registry.temporary("pass", First.name, First), registry.temporary("pass", Second.name, Second):
        plan = dq.make_plan(*case, Recipe("r", "", (Step(First.name), Step(Second.name))), progress=False)
    assert plan.sections[First.name].data != plan.sections[Second.name].data


def test_resumes_after_the_last_finished_pass(case, tmp_path, counting) -> None:
    recipe = Recipe("r", "", (Step("weight-ranges"), Step("counting")))
    counting.fail = True
    with pytest.raises(KeyboardInterrupt):
        dq.make_plan(*case, recipe, workdir=tmp_path, progress=False)
    counting.fail = False
    plan = dq.make_plan(*case, recipe, workdir=tmp_path, progress=False)
    again = dq.make_plan(*case, recipe, workdir=tmp_path, progress=False)
    assert counting.runs == 2
    assert plan == again == dq.make_plan(*case, recipe, progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": 1}, "seed is 1 here and 0 there"),
        ({"weight_bits": 4}, "weight_bits is 4 here and 8 there"),
        ({"options": {"counting": {"value": 2}}}, "option value of counting is 2 here and 1 there"),
        ({"recipe": "fast"}, "the list of passes is .* here and counting there"),
        ({"denoiser": 7}, "the hash of the denoiser's weights is .*; the hash of the calibration set is"),
    ],
)
def test_a_folder_of_other_settings_is_refused_by_name_and_goes_on_with_its_own(
    case, tmp_path, counting, given, message: str
) -> None:
    recipe = Recipe("r", "", (Step("counting"),))
    counting.fail = True
    with pytest.raises(KeyboardInterrupt):
        dq.make_plan(*case, recipe, workdir=tmp_path / "work", progress=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = {"denoiser": case[0], "calibration": case[1], "recipe": recipe} | given
    if "denoiser" in given:
        other |= {"denoiser": tiny_denoiser(7), "calibration": recorded(tiny_denoiser(7), tmp_path / "calib")}
    with pytest.raises(RecipeError, match=f"work holds the intermediate results of another run: {message}"):
        dq.make_plan(**other, workdir=tmp_path / "work", progress=False)
    assert {path: path.read_bytes() for path in before} == before
    counting.fail = False
    plan = dq.make_plan(*case, recipe, workdir=tmp_path / "work", progress=False)
    assert plan.sections["counting"].data == {"value": 1}


def test_other_code_runs_again_and_is_named(case, tmp_path, counting, monkeypatch, caplog) -> None:
    recipe = Recipe("r", "", (Step("counting"),))
    for release in ("1.0 (aaaa)", "1.0 (bbbb)", "1.0 (bbbb)"):
        monkeypatch.setattr("dq_plugins.recipe.runner.library_code", lambda release=release: {"dq-plugins": release})
        dq.make_plan(*case, recipe, workdir=tmp_path, progress=False)
    assert counting.runs == 2
    assert "of other code (dq-plugins is 1.0 (bbbb) here and 1.0 (aaaa) there)" in caplog.text


def test_another_release_or_source_of_a_plugin_runs_again_and_stands_in_the_plan(
    case, tmp_path, counting, monkeypatch
) -> None:
    recipe = Recipe("r", "", (Step("weight-ranges"), Step("counting")))
    for provider in ("acme 1.0 (aaaa)", "acme 1.0 (bbbb)", "acme 1.0 (bbbb)"):
        monkeypatch.setattr(
            "dq_plugins.recipe.runner.plugin_code",
            lambda plugin, provider=provider: provider if plugin.name == "counting" else "",
        )
        plan = dq.make_plan(*case, recipe, workdir=tmp_path, progress=False)
        assert [each.provider for each in plan.passes] == [None, provider]
    assert counting.runs == 2


def test_a_folder_in_which_another_process_works_is_refused(case, tmp_path, counting) -> None:
    with exclusive(tmp_path), pytest.raises(DQError, match="another process is writing to"):
        dq.make_plan(*case, Recipe("r", "", (Step("counting"),)), workdir=tmp_path, progress=False)


def test_a_finished_plan_is_not_made_again_and_another_run_in_its_folder_stays(case, tmp_path, counting) -> None:
    recipe, out = Recipe("r", "", (Step("counting"),)), tmp_path / "out"
    plan = dq.make_plan(*case, recipe, out=out, progress=False)
    assert dq.QuantPlan.load(out) == plan
    assert [path.name for path in out.iterdir()] == ["plan.json"]
    counting.fail = True
    with pytest.raises(KeyboardInterrupt):
        dq.make_plan(*case, recipe, seed=1, out=out, progress=False)
    assert dq.make_plan(*case, recipe, out=out, progress=False) == plan
    assert counting.runs == 2
    assert (out / "work" / "run.json").exists()
    counting.fail = False
    assert dq.make_plan(*case, recipe, seed=1, out=out, progress=False) == dq.QuantPlan.load(out) != plan
    assert not (out / "work").exists()


def test_a_finished_plan_of_another_run_is_replaced_with_a_word(case, tmp_path, counting, caplog) -> None:
    def make(**options):
        caplog.clear()
        made = dq.make_plan(*case, Recipe("r", "", (Step("counting"),)), out=tmp_path, progress=False, **options)
        return made, "".join(each.getMessage() for each in caplog.records if each.name.startswith("dq_plugins"))

    _, nothing = make()
    _, again = make()
    assert (nothing, again) == ("", "")
    counting.fail = True
    with pytest.raises(KeyboardInterrupt):
        make(weight_bits=4)
    assert f"{tmp_path} holds a finished plan of another run (weight_bits is 4 here and 8 there)" in caplog.text
    assert dq.QuantPlan.load(tmp_path).targets.weight_bits == 8  # until the other one is whole
    counting.fail = False
    assert "which this one will replace" in make(weight_bits=4)[1]
    other, _ = make()
    other.save(tmp_path)  # by hand: it says no longer what it follows from
    assert "changed or saved by hand" in make(seed=1)[1]


def test_a_damaged_intermediate_result_runs_again(case, tmp_path, counting) -> None:
    recipe = Recipe("r", "", (Step("counting"),))
    dq.make_plan(*case, recipe, workdir=tmp_path, progress=False)
    (tmp_path / "00-counting" / "plan.json").write_bytes(b"{")
    dq.make_plan(*case, recipe, workdir=tmp_path, progress=False)
    assert counting.runs == 2


def test_results_that_a_pass_cannot_go_on_from_are_named(case, tmp_path, counting, monkeypatch) -> None:
    recipe = Recipe("r", "", (Step("counting"),))

    def run(self, plan, context) -> None:
        (context.workdir / "unit").touch()
        raise KeyError("up")

    monkeypatch.setattr(counting, "run", run)
    for _ in range(2):
        with pytest.raises(KeyError if not list(tmp_path.rglob("unit")) else RecipeError) as caught:
            dq.make_plan(*case, recipe, workdir=tmp_path, progress=False)
    assert str(tmp_path / "00-counting") in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((Step("finite-set-ranges"),), "needs 'weight-ranges'"),
        ((Step("activation-ranges"), Step("timestep-groups")), "must come after 'timestep-groups'"),
        ((), "no passes"),
    ],
)
def test_wrong_order_is_refused(case, steps, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        dq.make_plan(*case, Recipe("r", "", steps), progress=False)


@pytest.mark.parametrize(
    ("option", "fault"),
    [
        ({"metod": "mse"}, "there is no option 'metod'; did you mean 'method'\\?"),
        ({"bit": 4}, "there is no option 'bit';"),
        ({"embedding_bits": "many"}, "option 'embedding_bits': .*"),
    ],
)
def test_wrong_options_name_the_pass_and_its_options(case, option, fault) -> None:
    with pytest.raises(RecipeError, match=rf"'weight-ranges': {fault} its options are: embedding_bits, method"):
        dq.make_plan(*case, "fast", options={"weight-ranges": option}, progress=False)


def test_options_for_a_pass_that_does_not_run_are_refused(case) -> None:
    with pytest.raises(RecipeError, match="no pass 'nothing'"):
        dq.make_plan(*case, "fast", options={"nothing": {}}, progress=False)


def test_calibration_of_another_model_is_refused(case) -> None:
    with pytest.raises(CalibrationError, match="other weights"):
        dq.make_plan(tiny_denoiser(9), case[1], "fast", progress=False)


def test_a_pass_that_changes_weights_is_caught(case, tmp_path) -> None:
    class Vandal(Pass):
        name = "vandal"

        def run(self, plan, context) -> None:
            context.denoiser.enter.weight.add_(1)

    denoiser = tiny_denoiser(4)
    with registry.temporary("pass", "vandal", Vandal), pytest.raises(RecipeError, match="changed the denoiser"):
        dq.make_plan(denoiser, recorded(denoiser, tmp_path), Recipe("r", "", (Step("vandal"),)), progress=False)


def test_nan_weights_name_the_layer(tmp_path, monkeypatch) -> None:
    denoiser = tiny_denoiser(5)
    calibration = recorded(denoiser, tmp_path)
    denoiser.body[0].alpha.weight[0, 0, 0, 0] = float("nan")
    monkeypatch.setattr(calibration, "check_model", lambda _: None)
    with pytest.raises(PlanError, match=r"body\.0\.alpha"):
        dq.make_plan(denoiser, calibration, "fast", progress=False)


def test_options_of_a_pass_are_a_mapping() -> None:
    recipe = Recipe("mine", "", (Step("weight-ranges"),))
    with pytest.raises(RecipeError, match="options of pass 'weight-ranges' are values by name, got 4"):
        recipe.with_options({"weight-ranges": 4})  # type: ignore[dict-item]


def test_targets_are_those_of_the_call_then_of_the_recipe(case) -> None:
    recipe = Recipe(
        "r", "", (Step("weight-ranges"), Step("activation-ranges")), {"symmetric_acts": True, "edge_bits": 6}
    )
    plan = dq.make_plan(*case, recipe, weight_bits=4, act_bits=4, symmetric_weights=False, progress=False)
    assert plan.targets == Targets(4, 4, edge_bits=6, symmetric_weights=False, symmetric_acts=True)
    for layer in plan.layers.values():
        assert layer.width == ("W6A6" if layer.roles & {"first", "last"} else "W4A4")
        assert layer.activation.symmetric
        assert not layer.weight.symmetric
    other = dq.make_plan(*case, recipe, weight_bits=4, act_bits=4, symmetric_acts=False, progress=False)
    assert not all(layer.activation.symmetric for layer in other.layers.values())


@pytest.mark.parametrize("widths", [{"weight_bits": 0}, {"act_bits": 1}, {"edge_bits": 17}, {"weight_bits": "4"}])
def test_widths_that_do_not_exist_are_refused(case, widths) -> None:
    with pytest.raises(PlanError, match=rf"{next(iter(widths))} is a number of bits"):
        dq.make_plan(*case, "fast", progress=False, **widths)
