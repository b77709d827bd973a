"""The commands as a user chains them, on the bundled transformer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dq_plugins.bundled_denoisers import bundled
from dq_plugins.cli import COMMANDS, main
from dq_plugins.commands.plan import parse_options
from dq_plugins.errors import RecipeError
from dq_plugins.exclusive import exclusive

MODEL = str(bundled("digits"))
SHORT = ["--steps", "3", "--images", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workflow")
    assert main(["record", MODEL, "--out", str(folder / "calib"), *SHORT]) == 0
    command = ["plan", MODEL, str(folder / "calib"), "--recipe", "fast", "--out", str(folder / "plan")]
    assert main([*command, "--option", "timestep-groups.groups=2"]) == 0
    return folder


def test_plan_prints_widths_and_leaves_no_intermediate_results(folder: Path, capsys) -> None:
    assert sorted(p.suffix for p in (folder / "plan").iterdir()) == [".json", ".safetensors"]
    assert len(json.loads((folder / "plan" / "plan.json").read_text())["record"]["groups"]["default"]["edges"]) == 1


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_two_runs_with_one_folder_do_not_meet(folder: Path, tmp_path: Path, command: str, capsys) -> None:
    calibration = [str(folder / "calib")] if command == "plan" else []
    with exclusive(tmp_path):
        assert main([command, MODEL, *calibration, "--out", str(tmp_path)]) == 2
    assert f"another process is writing to {tmp_path}" in capsys.readouterr().err


def test_apply_says_how_each_layer_runs(folder: Path, capsys) -> None:
    assert main(["apply", MODEL, str(folder / "plan"), "--json"]) == 0
    states = [e["state"] for e in json.loads(capsys.readouterr().out).values()]
    assert states.count("integer") > 30
    assert main(["apply", MODEL, str(folder / "plan"), "--backend", "simulate"]) == 0
    assert "simulated" in capsys.readouterr().out


def test_evaluate_compares_backends(folder: Path, capsys) -> None:
    command = ["evaluate", MODEL, str(folder / "plan"), str(folder / "calib"), "--backend", "simulate", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)["simulate"]
    assert len(found) == 3
    assert min(found.values()) > 15


def test_report_writes_one_page(folder: Path) -> None:
    assert main(["report", str(folder / "plan"), "--out", str(folder / "report.html")]) == 0
    assert "Timestep groups" in (folder / "report.html").read_text()


def test_quantize_does_it_all(folder: Path, capsys) -> None:
    out = folder / "quantized"
    assert main(["quantize", MODEL, "--out", str(out), "--recipe", "fast", "--backend", "simulate", *SHORT]) == 0
    assert "SQNR" in capsys.readouterr().out
    assert (out / "plan" / "plan.json").is_file()
    assert not (out / "pipeline").exists()  # fake quantization is not a checkpoint


def test_quantize_saves_a_pipeline_that_loads(folder: Path, capsys) -> None:
    out = folder / "torchao"
    assert main(["quantize", MODEL, "--out", str(out), "--recipe", "fast", *SHORT]) == 0
    assert f"load_pipeline('{out / 'pipeline'}')" in capsys.readouterr().out
    code = f"import dq_diffusers; print(dq_diffusers.load_pipeline({str(out / 'pipeline')!r}).transformer)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "IntegerLinear" in done.stdout, done.stderr[-2000:]


def test_errors_are_one_paragraph_and_status_two(folder: Path, capsys) -> None:
    assert main(["plan", MODEL, str(folder / "calib"), "--recipe", "fasst", "--out", str(folder / "x")]) == 2
    assert "fast" in capsys.readouterr().err
    assert main(["apply", str(folder), str(folder / "plan")]) == 2
    assert "model_index.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"dq-plugins {command}" in capsys.readouterr().out.partition("example:")[2]


def test_off_a_terminal_nothing_but_the_result_is_printed(tmp_path: Path, capsys) -> None:
    assert main(["record", MODEL, "--out", str(tmp_path / "calib"), *SHORT]) == 0
    command = ["plan", MODEL, str(tmp_path / "calib"), "--recipe", "fast", "--out", str(tmp_path / "plan")]
    assert main(command) == 0
    assert capsys.readouterr().err == ""


def test_options_are_parsed_as_json_or_text() -> None:
    parsed = parse_options(["a.x=4", "a.y=dp", "b.z=[1, 2]"])
    assert parsed == {"a": {"x": 4, "y": "dp"}, "b": {"z": [1, 2]}}
    with pytest.raises(RecipeError, match="PASS"):
        parse_options(["nonsense"])
