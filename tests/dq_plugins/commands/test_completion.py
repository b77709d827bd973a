import subprocess

import pytest

from dq_plugins.cli import COMMANDS, main


def test_bash_takes_the_script_and_knows_the_commands(capsys, tmp_path):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    assert all(name in script.read_text() for name in COMMANDS)
    subprocess.run(["bash", "-n", script], check=True)
