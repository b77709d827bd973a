"""What is wrong with arguments is said before any work starts."""

import subprocess
import sys

import pytest

from dq_plugins.cli import main, parse


def refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "nowhere", "--out", "x"], "no folder 'nowhere'; it may also be one of emoji, digits"),
        (["quantize", "digits", "--out", "x", "--backend", "toachao"], "did you mean 'torchao'"),
        (["quantize", "digits", "--out", "x", "--recipe", "defualt"], "did you mean 'default'"),
        (["record", "digits", "--out", "x", "--steps", "0"], "at least 1 is needed, not '0'"),
        (["record", "digits", "--out", "x", "--images", "few"], "at least 1 is needed, not 'few'"),
        (["apply", "digits", "nowhere"], "no folder 'nowhere'"),
        (["diff", "nowhere", "nowhere"], "no folder 'nowhere'"),
        (["recipes", "defualt"], "did you mean 'default'"),
    ],
)
def test_wrong_arguments_are_refused_in_their_own_words(capsys, arguments, said):
    error = refused(capsys, *arguments)
    assert error.startswith(f"dq-plugins {arguments[0]}: ")
    assert said in error
    assert "usage:" not in error


def test_a_folder_without_a_pipeline_is_told_from_one_that_is_missing(capsys, tmp_path):
    assert "model_index.json is missing" in refused(capsys, "plan", str(tmp_path), str(tmp_path), "--out", "x")


def test_a_folder_of_a_run_stands_for_the_one_plan_in_it_and_others_are_refused(capsys, tmp_path):
    (tmp_path / "plan").mkdir()
    said = refused(capsys, "apply", "digits", str(tmp_path))
    assert "plan.json is missing; `dq-plugins quantize` writes such a folder" in said
    (tmp_path / "plan" / "plan.json").touch()
    assert parse(["report", str(tmp_path)]).plan == str(tmp_path / "plan")
    (tmp_path / "plan-2").mkdir()
    (tmp_path / "plan-2" / "plan.json").touch()
    assert f"give one of {tmp_path / 'plan'}, {tmp_path / 'plan-2'}" in refused(capsys, "report", str(tmp_path))
    assert "manifest.json is missing" in refused(capsys, "plan", "digits", str(tmp_path), "--out", "x")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "diffusers"], "does not execute plans; these do:"),
        (["--option", "nosuch.x=1"], "has no pass 'nosuch'"),
        (["--option", "timestep-groups.nosuch=1"], "nosuch"),
        (["--weight-bits", "99"], "weight_bits is a number of bits"),
    ],
)
def test_quantize_checks_recipe_widths_and_backend_before_it_records(capsys, tmp_path, arguments, said):
    assert main(["quantize", "digits", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_and_wrong_arguments_do_not_wait_for_torch():
    code = """
import sys
from dq_plugins.cli import main, parse
try:
    main(sys.argv[1:])
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    for arguments in (["--help"], ["quantize", "--help"], ["quantize", "nowhere", "--out", "x"], ["list"]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def test_defaults_are_told_once(capsys):
    with pytest.raises(SystemExit):
        main(["record", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "denoising steps (default: 20)" in text
    assert "seed of the first image (default: 0)" in text
    assert "None" not in text
