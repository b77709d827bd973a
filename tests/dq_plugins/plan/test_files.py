import subprocess
import sys
from pathlib import Path

import pytest
import torch
from artifacts import edit_file, edit_record
from plans import example_plan
from torch import nn

from dq_plugins.cli import main
from dq_plugins.errors import PlanError
from dq_plugins.hashing import weights_hash
from dq_plugins.layer_kinds import kind_name
from dq_plugins.plan import (
    PLAN,
    ActivationQuant,
    BiasCorrection,
    LayerPlan,
    LowRank,
    QuantPlan,
    Reason,
    Rotation,
    Subspace,
    WeightQuant,
)
from dq_plugins.plan.fitting import misfit
from dq_plugins.timesteps import TimestepGroups


def test_reloads_equal_hash_and_all(tmp_path: Path) -> None:
    plan = example_plan()
    loaded = QuantPlan.load(plan.save(tmp_path))
    assert loaded == plan
    assert loaded.hash == plan.hash
    assert torch.equal(loaded.layers["a"].weight.codes, plan.layers["a"].weight.codes)
    assert loaded.groups["all"] == plan.groups["all"]
    assert torch.equal(loaded.layers["a"].balance, plan.layers["a"].balance)
    assert torch.equal(loaded.layers["a"].bias_correction.values, plan.layers["a"].bias_correction.values)
    assert loaded.layers["a"].bias_correction.groups == "all"
    assert (loaded.shared_rows, loaded.learned_layers) == (plan.shared_rows, plan.learned_layers)
    assert (loaded.calibration_calls, loaded.sensitivity) == (plan.calibration_calls, plan.sensitivity)
    assert loaded.binary_training == plan.binary_training
    assert torch.equal(loaded.outlier_rows["a"].inputs, plan.outlier_rows["a"].inputs)
    assert torch.equal(loaded.temporal_table.outputs["b"].rows, plan.temporal_table.outputs["b"].rows)


def test_same_plan_same_bytes(tmp_path: Path) -> None:
    for name in ("x", "y"):
        example_plan().save(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert len(files) == 2
    for file in files:
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.layers["a"].weight.scale.mul_(2),
        lambda p: p.layers["a"].activation.zero_point.add_(1),
        lambda p: p.sections["curve"].data["error"].append(0.5),
        lambda p: p.groups.update(all=TimestepGroups((501.0,))),
        lambda p: p.layers["b"].__setattr__("unquantized_reason", Reason("other")),
        lambda p: p.layers["a"].balance.mul_(2),
        lambda p: p.shared_rows.update(all=(0, 0)),
        lambda p: p.outlier_rows["a"].outputs.add_(1),
        lambda p: p.temporal_table.outputs["b"].scale.add_(1),
        lambda p: p.sensitivity.noise["a"]["weight"].update({3: 0.3}),
        lambda p: p.__setattr__("learned_layers", frozenset()),
        lambda p: p.__setattr__("learned_ranges", frozenset()),
        lambda p: p.layers["a"].bias_correction.values.add_(1),
        lambda p: p.layers["a"].__setattr__("bias_correction", None),
    ],
)
def test_any_change_changes_the_hash(change) -> None:
    plan = example_plan()
    change(plan)
    assert plan.hash != example_plan().hash


def test_hash_is_the_same_in_another_process(tmp_path: Path) -> None:
    plan = example_plan()
    plan.save(tmp_path)
    code = f"import dq_plugins.plan as p; print(p.QuantPlan.load({str(tmp_path)!r}).hash)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == plan.hash


def edit(folder: Path, **changes) -> None:
    edit_record(folder / "plan.json", lambda record: record.update(changes))


def tensors(folder: Path) -> Path:
    return next(folder.glob("plan-*.safetensors"))


def other_tensors(folder: Path) -> None:
    example_plan(1).save(folder / "other")
    tensors(folder / "other").replace(tensors(folder))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "plan.json").unlink(), "missing"),
        (lambda f: (f / "plan.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "plan.json").write_text("[" * 100_000), "cannot be read as JSON"),
        (lambda f: (f / "plan.json").write_text("[]"), "not a plan"),
        (lambda f: (f / "plan.json").write_bytes(b"\x80\x04\x95"), "cannot be read as JSON"),
        (lambda f: edit_file(f / "plan.json", format_version=99), "Upgrade"),
        (lambda f: edit_file(f / "plan.json", library_version="0.0.1"), "altered"),
        (lambda f: edit(f, surprise=1), "surprise"),
        (lambda f: edit(f, seed="zero"), "seed"),
        (lambda f: tensors(f).unlink(), "missing"),
        (lambda f: tensors(f).write_bytes(tensors(f).read_bytes()[:-4]), "cannot be read"),
        (lambda f: tensors(f).write_bytes(b"\xff" * 64), "cannot be read"),
        (lambda f: other_tensors(f), "hash differs"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(tmp_path: Path, damage, message: str) -> None:
    example_plan().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(PlanError, match=message):
        QuantPlan.load(tmp_path)


def test_refuses_other_weights_and_other_layers() -> None:
    net = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Conv2d(1, 1, 1)})
    plan = example_plan()
    plan.model_hash = weights_hash(net)
    plan.check_model(net)
    with torch.no_grad():
        net["a"].weight[0, 0] += 1
    with pytest.raises(PlanError, match="other weights"):
        plan.check_model(net)
    plan.layers["nowhere"] = LayerPlan("linear")
    with pytest.raises(PlanError, match="'nowhere'"):
        plan.check_model(net)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.layers["a"].weight.__setattr__("scale", torch.ones(2)), "2 weight scales.*1 or 3"),
        (lambda p: p.layers["a"].weight.__setattr__("codes", torch.zeros(5, 3, dtype=torch.int8)), "codes of shape"),
        (lambda p: p.layers["a"].__setattr__("balance", torch.ones(4)), "balance of 4 channels, and 5"),
        (
            lambda p: p.layers["a"].__setattr__("bias_correction", BiasCorrection(torch.zeros(1, 2))),
            "of 2 channels",
        ),
        (lambda p: p.layers["a"].__setattr__("kind", "conv2d"), "planned as a conv2d layer, and is a linear"),
        (lambda p: p.outlier_rows["a"].__setattr__("inputs", torch.zeros(1, 4)), "rows of 4 inputs"),
        (
            lambda p: p.layers["a"].weight.__setattr__("group_scale", torch.ones(3, 2, dtype=torch.uint8)),
            "3 outputs in 2 groups of inputs",
        ),
        (lambda p: p.layers["a"].__setattr__("rotation", Rotation("hadamard", 4)), "blocks of 4, and 5 input channels"),
        (
            lambda p: p.layers["a"].__setattr__(
                "low_rank", LowRank(torch.zeros(1, 4).half(), torch.zeros(3, 1).half())
            ),
            r"branch for a weight \(3, 4\)",
        ),
        (
            lambda p: p.layers["a"].__setattr__("subspace", Subspace(torch.eye(4)[:2].half())),
            "directions of 4 channels",
        ),
    ],
)
def test_decisions_that_do_not_fit_the_layer_are_refused(change, message) -> None:
    net = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Conv2d(1, 1, 1)})
    plan = example_plan()
    plan.model_hash = weights_hash(net)
    change(plan)
    with pytest.raises(PlanError, match=message):
        plan.check_model(net)


def test_the_balance_of_a_grouped_convolution_has_its_input_channels() -> None:
    for net, channels, scales in (
        (nn.Conv2d(6, 4, 1, groups=2), 6, 4),
        (nn.ConvTranspose2d(6, 4, 1, groups=2), 6, 1),
        (nn.Conv1d(6, 4, 3), 6, 4),
    ):
        correction = BiasCorrection(torch.zeros(1, 4))
        weight = WeightQuant(8, torch.ones(scales))
        plan = LayerPlan(kind_name(net), weight=weight, balance=torch.ones(channels), bias_correction=correction)
        assert misfit(plan, net) == ""


def test_a_change_by_hand_is_refused_with_the_command_that_accepts_it(tmp_path: Path, capsys) -> None:
    path = example_plan().save(tmp_path, {"seed": 1}) / "plan.json"
    path.write_text(path.read_text().replace('"text": "it is tiny"', '"text": "I say so"'))
    with pytest.raises(PlanError, match=f"altered.*on purpose.*`dq-plugins sign {path}`"):
        QuantPlan.load(tmp_path)
    assert main(["sign", str(tmp_path)]) == 0
    assert "is signed" in capsys.readouterr().out
    plan = QuantPlan.load(tmp_path)
    assert plan.layers["b"].why == "I say so"
    assert PLAN.find(path, {"seed": 1}) is None  # it does not follow from these settings any more
    assert len(list(tmp_path.iterdir())) == 2


def test_signing_checks_everything_else(tmp_path: Path, capsys) -> None:
    path = example_plan().save(tmp_path, {"seed": 1}) / "plan.json"
    whole = path.read_bytes()
    assert main(["sign", str(path)]) == 0
    assert path.read_bytes() == whole
    for old, new, message in (
        ('"bits": 4', '"bits": 99', "layers.a.weight.bits"),
        ('"format": "plan"', '"format": "plane"', "not a plan"),
        ('"tensors_hash": "', '"tensors_hash": "../', "tensors_hash"),
        ('"learned_layers": [', '"learned_layers": ["nowhere", ', "nowhere"),
        ("{", "[{", "cannot be read as JSON"),
    ):
        path.write_text(whole.decode().replace(old, new, 1))
        assert main(["sign", str(path)]) == 2, old
        assert message in capsys.readouterr().err
    path.write_text("[]")
    assert main(["sign", str(path)]) == 2
    path.write_bytes(whole)
    tensors(tmp_path).unlink()
    assert main(["sign", str(path)]) == 2 or QuantPlan.load(tmp_path)


def test_contradictions_are_found() -> None:
    plan = example_plan()
    plan.layers["a"].activation.groups = "none such"
    with pytest.raises(PlanError, match="none such"):
        plan.validate()
    plan = example_plan()
    plan.groups["all"] = TimestepGroups()
    with pytest.raises(PlanError, match="2 activation scales"):
        plan.validate()
    plan = example_plan()
    plan.layers["a"].bias_correction = BiasCorrection(torch.zeros(3, 3), "all")
    with pytest.raises(PlanError, match="3 rows of bias correction, but timestep groups 'all' are 2"):
        plan.validate()
    plan = example_plan()
    plan.layers["b"].unquantized_reason = None
    with pytest.raises(PlanError, match="does not say why"):
        plan.validate()


def test_unknown_layer_answers_with_close_names() -> None:
    plan = example_plan()
    plan.layers["up.attention.to_q"] = LayerPlan("linear")
    with pytest.raises(PlanError, match=r"up\.attention\.to_q"):
        plan.layer("up.attention.to_k")


def test_critical_sections_must_be_implemented() -> None:
    plan = example_plan()
    plan.layers["a"] = LayerPlan("linear")
    plan.outlier_rows, plan.temporal_table = {}, None
    plan.refuse_unimplemented(set(), "x")
    plan.sections["curve"].critical = True
    with pytest.raises(PlanError, match="curve"):
        plan.refuse_unimplemented(set(), "x")
    plan.refuse_unimplemented({"curve"}, "x")


def test_what_a_layer_needs_beyond_its_quantizers_must_be_implemented() -> None:
    plan = example_plan()
    assert plan.features == {"balance": ("a",), "bias_correction": ("a",), "outlier_rows": (), "temporal_table": ()}
    plan.outlier_rows, plan.temporal_table = {}, None
    with pytest.raises(PlanError, match=r"adapter 'x' does not implement bias_correction \(layer 'a'\), which"):
        plan.refuse_unimplemented({"balance"}, "x")
    plan.refuse_unimplemented({"balance", "bias_correction"}, "x")


def set_in(record: dict, path: str, value) -> None:
    *parents, last = path.split("/")
    for part in parents:
        record = record[part]
    record[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("layers/a/weight/bits", "4", r"layers\.a\.weight\.bits"),
        ("layers/a/weight/bits", 99, r"layers\.a\.weight\.bits.*16"),
        ("layers/a/weight/scale", "nowhere", r"layers\.a\.weight\.scale.*'nowhere'"),
        ("layers/a/activation/zero", 1, r"layers\.a\.activation\.\w+\.zero"),
        ("layers/a/balance", "layers/a.weight.codes", r"layers\.a: .*balance"),
        ("layers/a/bias_correction/groups", 3, r"layers\.a\.bias_correction\.groups"),
        ("groups/all", {"edges": [], "bottom": 0}, r"groups\.all"),
        ("groups/all/edges", [3.0, 1.0], r"groups\.all: .*ascend"),
        ("schedule/timesteps", [], "schedule"),
        ("calibration_calls/visits", [1], r"calibration_calls: .*as many visits"),
        ("sensitivity/noise/a", {"bias": {}}, r"sensitivity\.noise\.a\.bias"),
        ("sensitivity/noise/a/weight", {"four": 1.0}, r"sensitivity\.noise\.a\.weight\.four"),
        ("temporal_table/timesteps", [9.0, 1.0], r"temporal_table: .*ascend"),
        ("outlier_rows/a/positions", [0, 1], r"outlier_rows\.a: .*\(0, 1\)"),
        ("learned_layers", ["nowhere"], r"learned_layers names layer 'nowhere'"),
        ("shared_rows/all", [0, 2], r"shared_rows of 'all' are numbered"),
        ("binary_training/surprise", [], r"binary_training\.surprise"),
        ("layers/b/unquantized_reason/code", "mood", r"layers\.b\.unquantized_reason\.code"),
        ("sections/curve/critical", "yes", r"sections\.curve\.critical"),
    ],
)
def test_wrong_content_is_refused_and_the_message_names_the_place(tmp_path: Path, path, value, message) -> None:
    example_plan().save(tmp_path)
    edit_record(tmp_path / "plan.json", lambda record: set_in(record, path, value))
    with pytest.raises(PlanError, match=message):
        QuantPlan.load(tmp_path)


def test_the_format_has_a_schema() -> None:
    schema = PLAN.json_schema()
    assert {"balance", "bias_correction", "weight"} <= set(schema["$defs"]["LayerPlan"]["properties"])
    assert schema["$defs"]["LayerPlan"]["additionalProperties"] is False


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightQuant(4, torch.tensor([0.0])),
        lambda: WeightQuant(4, torch.tensor([float("nan")])),
        lambda: WeightQuant(4, torch.ones(2), zero_point=torch.zeros(3, dtype=torch.int32)),
        lambda: WeightQuant(4, torch.ones(1), codes=torch.tensor([9], dtype=torch.int8)),
        lambda: WeightQuant(4, torch.ones(1), codes=torch.tensor([1.5])),
        lambda: WeightQuant(4, torch.tensor([1e-44])),
        lambda: WeightQuant(4, torch.tensor([float("inf")])),
        lambda: WeightQuant(4, torch.ones(1, dtype=torch.float64)),
        lambda: WeightQuant(4, torch.ones(1, dtype=torch.float8_e4m3fn)),
        lambda: WeightQuant(4, torch.ones(1), zero_point=torch.tensor([8], dtype=torch.int32)),
        lambda: WeightQuant(4, torch.ones(1), zero_point=torch.tensor([1], dtype=torch.int64)),
        lambda: ActivationQuant(8, "g", torch.ones(1), torch.tensor([0.5])),
        lambda: ActivationQuant(8, "g", torch.ones(1), torch.tensor([2**31 - 1], dtype=torch.int32)),
        lambda: ActivationQuant(8, "g", torch.ones(2), torch.zeros(1, dtype=torch.int32)),
        lambda: ActivationQuant(8, "g", torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)),
        lambda: BiasCorrection(torch.zeros(2, 3)),
        lambda: BiasCorrection(torch.zeros(3)),
        lambda: BiasCorrection(torch.full((1, 3), float("nan"))),
        lambda: LayerPlan("linear", balance=torch.tensor([1.0, 0.0])),
        lambda: LayerPlan(
            "linear", weight=WeightQuant(4, torch.ones(2)), bias_correction=BiasCorrection(torch.zeros(1, 3))
        ),
        lambda: LayerPlan("linear", balance=torch.ones(2, dtype=torch.float64)),
    ],
)
def test_impossible_decisions_are_refused(make) -> None:
    with pytest.raises(PlanError):
        make()
