"""A disk that fills up, or a folder that may not be written: one error that names the file, and nothing is lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dq_plugins as dq
from dq_plugins.atomic import replacing, write_atomically
from dq_plugins.cli import main
from dq_plugins.errors import DQError
from dq_plugins.quantized.shelf import Shelf
from dq_plugins.recipe import Recipe, Step
from dq_plugins.report.plan_page import plan_page
from dq_plugins.scratch import is_scratch
from dq_plugins.testing.denoiser import TinyDenoiser, sample

STEPS = (
    Step("weight-ranges"),
    Step("activation-ranges"),
    Step("gptq", {"memory_mb": 16}),
    Step("block-reconstruction", {"iterations": 2, "calls": 2}),
)


class Disk:
    """Writes succeed until ``left`` of them are done; every later one fails as a full disk's does."""

    def __init__(self, code: int) -> None:
        self.code, self.left, self.done = code, 10**9, 0
        self._fsync = os.fsync

    def fsync(self, descriptor: int) -> None:
        if self.done >= self.left:
            raise OSError(self.code, os.strerror(self.code))
        self.done += 1
        self._fsync(descriptor)


@pytest.fixture(params=[errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=["full", "quota", "read-only"])
def disk(request, monkeypatch) -> Disk:
    disk = Disk(request.param)
    monkeypatch.setattr(os, "fsync", disk.fsync)
    return disk


def at_every_write(disk: Disk, out: Path, run: Callable[[], object], every: int = 1) -> object:
    """Fill the disk before each write of a run in a fresh folder, and go on when there is room again."""
    disk.done, whole = 0, run()
    for left in range(0, disk.done, every):
        move(out)
        disk.done, disk.left = 0, left
        with pytest.raises((DQError, OSError), match=os.strerror(disk.code)) as failure:
            run()
        assert str(out) in str(failure.value), "the message names no file"
        assert not [path for path in out.rglob("*") if is_scratch(path)]
        disk.left = 10**9
        assert run() == whole
    return whole


def move(out: Path) -> None:
    os.rename(out, out.with_name(f"{out.name}-{len(list(out.parent.iterdir()))}"))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = TinyDenoiser(width=8)
    return denoiser, dq.record(denoiser, sample, tmp_path_factory.mktemp("c") / "calib", progress=False)


def test_recording(disk, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dq_plugins.calibration.writer.FREE_SECONDS", 60.0)
    denoiser, out = TinyDenoiser(width=8), tmp_path / "calib"
    at_every_write(disk, out, lambda: dq.record(denoiser, sample, out, progress=False).hash, every=3)


def test_intermediate_results_and_the_plan(disk, case, tmp_path) -> None:
    out = tmp_path / "plan"

    def run() -> str:
        return dq.make_plan(*case, Recipe("r", "", STEPS), weight_bits=4, out=out, progress=False).hash

    at_every_write(disk, out, run, every=5)


def test_a_report(disk, case, tmp_path) -> None:
    plan = dq.make_plan(*case, Recipe("r", "", STEPS[:2]), progress=False)
    file = tmp_path / "report.html"
    page = plan_page(plan)
    old = page.save(file).read_bytes()
    disk.left = disk.done
    with pytest.raises(OSError, match=f"{os.strerror(disk.code)}: .*report.html"):
        page.save(file)
    assert file.read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_command_line_says_it_in_one_line(disk, tmp_path, capsys) -> None:
    disk.left = 0
    out = tmp_path / "calib"
    assert main(["record", str(dq.bundled("digits")), "--out", str(out), "--steps", "2", "--images", "1"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert os.strerror(disk.code) in line
    assert str(out) in line


def test_tensors_of_other_writers(tmp_path, monkeypatch) -> None:
    import safetensors.torch

    def full(*_: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(DQError, match=r"000000.safetensors cannot be written.*No space left"):
        Shelf(tmp_path / "shelf").put("x", torch.ones(2))
    with (
        pytest.raises(OSError, match=r"model.safetensors cannot be written: .*No space left"),
        replacing(tmp_path / "model.safetensors") as file,
    ):
        safetensors.torch.save_file({}, file)


def test_a_folder_that_may_not_be_written(case, tmp_path, monkeypatch) -> None:
    """As root every folder may be: the system's answer is stood in for."""

    def denied(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    runs: list[Callable[[], object]] = [
        lambda: dq.record(case[0], sample, tmp_path / "calib", progress=False),
        lambda: dq.make_plan(*case, Recipe("r", "", STEPS[:1]), out=tmp_path / "plan", progress=False),
        lambda: write_atomically(tmp_path / "report.html", b""),
    ]
    for run in runs:
        with pytest.raises((DQError, OSError), match="Permission denied") as failure:
            run()
        assert str(tmp_path) in str(failure.value)
