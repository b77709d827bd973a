from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dq_plugins.errors import DQError
from dq_plugins.exclusive import exclusive

HOLDER = """
import sys, time
from dq_plugins.exclusive import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_told_at_once_and_a_killed_one_blocks_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DQError, match=r"another process is writing to .*out"), exclusive(folder):
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert (folder / ".lock").exists()  # it had no time to tidy up
    with exclusive(folder):
        pass
    assert list(folder.iterdir()) == []


def test_an_error_inside_lets_go(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), exclusive(tmp_path):
        raise ValueError("inside")
    with exclusive(tmp_path):
        pass
