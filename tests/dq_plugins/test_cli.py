"""What every command has in common: wrong arguments, exit statuses, pipes."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dq_plugins
from dq_plugins.cli import COMMANDS, main


def test_version(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"{dq_plugins.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "command", "message"),
    [
        ([], "dq-plugins", "required: COMMAND"),
        (["raport"], "dq-plugins", "there is no command 'raport'; did you mean 'report'"),
        (["quantize", "digits", "--out", "c", "--recipee", "d"], "dq-plugins quantize", "did you mean '--recipe'?"),
        (["list", "passes"], "dq-plugins list", "unrecognized arguments: passes"),
        (["demo", "digits"], "dq-plugins demo", "unrecognized arguments: digits; did you mean '--model digits'?"),
    ],
)
def test_wrong_arguments(argv: list[str], command: str, message: str, capsys) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{command}: ")
    assert f"`{command} --help`" in error
    assert message in error


def test_errors_of_the_file_system_are_one_line(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    plan = tmp_path / "plan"
    dq_plugins.QuantPlan("Any", "0" * 64, "timestep", dq_plugins.Schedule((1.0,))).save(plan)
    assert main(["report", str(plan), "--out", str(tmp_path / "file" / "report.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dq-plugins report: ")
    assert len(error.splitlines()) == 1


def test_a_reader_that_stops_early_is_no_error() -> None:
    code = """
import sys
from dq_plugins.cli import main
from dq_plugins.commands import list
list.run = lambda args: print("a line\\n" * 99_999)
sys.exit(main(["list"]))
"""
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.readline()
    running.stdout.close()
    assert running.stderr.read() == ""
    assert running.wait() == 141


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"completion"}))
def test_every_command_can_answer_in_json_and_shows_an_example(command: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "--json" in text
    assert "example:\n  " in text
    assert f"dq-plugins {command}" in text.partition("example:")[2]
