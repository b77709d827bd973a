from pathlib import Path

from plans import example_plan

from dq_plugins.cli import main
from dq_plugins.plan import LayerPlan, Reason
from dq_plugins.plan.diff import diff_plans


def test_equal_plans_have_no_differences() -> None:
    assert diff_plans(example_plan(), example_plan()) == []


def test_names_what_differs() -> None:
    a, b = example_plan(), example_plan()
    b.layers["a"].weight.scale = b.layers["a"].weight.scale * 2
    b.layers["b"].unquantized_reason = Reason("another reason")
    b.layers["c"] = LayerPlan("linear")
    b.seed = 7
    where = {d.where for d in diff_plans(a, b)}
    assert where == {"seed", "layers.a.weight.scale", "layers.b.unquantized_reason.text", "layers.c"}


def test_command_prints_and_signals(tmp_path: Path, capsys) -> None:
    a, b = example_plan(), example_plan()
    b.recipe = "fast"
    a.save(tmp_path / "a")
    b.save(tmp_path / "b")
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "recipe" in capsys.readouterr().out
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "none")]) == 2
    assert f"there is no folder {str(tmp_path / 'none')!r}" in capsys.readouterr().err
