from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dq_plugins.scratch import OWNER, Scratch, make_folder

HOLDER = """
import sys, time
from dq_plugins.scratch import Scratch
with Scratch("held", sys.argv[1]) as folder:
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("x")
    print("held", flush=True)
    time.sleep(60)
"""


def test_it_is_gone_at_the_end_however_that_comes(tmp_path: Path) -> None:
    def fails() -> None:
        with Scratch("x", tmp_path) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "file").touch()
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fails()
    assert not list(tmp_path.iterdir())
    kept = Scratch("x", tmp_path / "new")
    assert kept.path.is_dir()
    del kept
    gc.collect()
    assert not list((tmp_path / "new").iterdir())


def test_what_a_killed_process_leaves_goes_and_what_a_living_one_holds_stays(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with Scratch("mine", tmp_path):
            assert len(list(tmp_path.iterdir())) == 2
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    (left,) = tmp_path.iterdir()
    assert (left / "sub" / "file").exists()
    with Scratch("mine", tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]


def test_only_ours_are_removed(tmp_path: Path) -> None:
    ours = "dq-write-" + 32 * "0" + ".tmp"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / OWNER).touch()
    (tmp_path / ours).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dq-notes.tmp").mkdir()
    (tmp_path / ours.replace("0", "1")).write_text("a file")
    being_made = tmp_path / ours.replace("0", "2")
    being_made.mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    with Scratch("x", tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == before - {being_made.name}
    assert (tmp_path / "elsewhere" / OWNER).exists()


def test_one_that_is_taken_away_while_it_is_made_is_made_again(tmp_path: Path, monkeypatch) -> None:
    original, taken = Path.mkdir, []

    def mkdir(self: Path, *args, **kwargs) -> None:
        original(self, *args, **kwargs)
        if self.name.startswith("dq-x") and not taken:
            taken.append(self)
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with Scratch("x", tmp_path) as folder:
        assert taken
        assert folder.is_dir()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(NotADirectoryError, match=r"/file is a file where a folder is needed"):
            make_folder(path)
