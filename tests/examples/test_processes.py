"""The two examples that share work over processes, with two workers each: the same bytes as in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_pipelines import text_pipeline

EXAMPLES = Path(__file__).parents[2] / "examples"
FEW = ["--recipe", "ranges", "--steps", "3", "--images", "5"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(folder: Path, out: str, *command: str) -> dict[str, bytes]:
    """Run a script on the pipeline in ``folder``; the files of the plan."""
    arguments = [sys.executable, *command, str(folder / "pipe"), str(folder / out), *FEW]
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(folder.glob("*.part-*"))
    return {path.name: path.read_bytes() for path in (folder / out / "plan").iterdir()}


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("processes")
    text_pipeline().save_pretrained(folder / "pipe")
    return folder, run(folder, "one", str(EXAMPLES / "workers.py"), "--workers", "1")


def test_two_processes_of_joblib(one):
    folder, expected = one
    assert run(folder, "two", str(EXAMPLES / "workers.py"), "--workers", "2") == expected


def test_two_ranks_of_torchrun(one):
    folder, expected = one
    assert run(folder, "ranks", *TORCHRUN, str(EXAMPLES / "ranks.py")) == expected
