from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import joblib
import pytest
import torch
from denoisers import tiny_denoiser

import dq_plugins as dq
from dq_plugins.calibration.parts import Runs
from dq_plugins.errors import CalibrationError, DQError
from dq_plugins.quantized.statistics import collect
from dq_plugins.workers import over_ranks, pool, shares, workers

T = (801.0, 501.0, 201.0)


def draw(seed, denoiser):
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    for t in T:
        x = x - 0.1 * denoiser(x, torch.tensor(t))


def draws(count: int) -> Runs:
    return Runs([partial(draw, seed) for seed in range(count)])


def fail(*_):
    raise CalibrationError("no")


def backends():
    yield "loky"
    yield pytest.param("ray", marks=pytest.mark.skipif(find("ray"), reason="ray is not installed"))


def find(name):
    from importlib.util import find_spec

    return find_spec(name) is None


@pytest.mark.parametrize("backend", backends())
def test_recordings_and_statistics_are_those_of_one_process(tmp_path, backend):
    denoiser = tiny_denoiser()
    one = dq.record(denoiser, draws(3), tmp_path / "one", progress=False)
    layers = ("enter",)
    expected = collect(denoiser, one, layers)
    if backend == "ray":
        from ray.util.joblib import register_ray

        register_ray()
    with joblib.parallel_config(backend), workers(2):
        two = dq.record(denoiser, draws(3), tmp_path / "two", progress=False)
        found = collect(denoiser, two, layers)
    assert two.hash == one.hash
    assert found.hash == expected.hash
    assert {p.name for p in tmp_path.iterdir()} == {"one", "two"}  # no parts are left


def test_a_part_that_was_recorded_before_an_interruption_is_not_computed_again(tmp_path):
    denoiser = tiny_denoiser()
    dq.record(denoiser, draws(3).part(0, 1), tmp_path / "c.part-0-of-2", progress=False)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "c.part-0-of-2").glob("shard-*")}
    assert before
    with workers(2), pytest.raises(CalibrationError, match="no"):
        dq.record(denoiser, Runs([partial(draw, 0), fail, fail]), tmp_path / "c", progress=False)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    with workers(2):
        found = dq.record(denoiser, draws(3), tmp_path / "c", progress=False)
    assert found.hash == dq.record(denoiser, draws(3), tmp_path / "one", progress=False).hash


def test_nobody_is_asked_where_there_is_nothing_to_share():
    assert pool().count == 1
    assert pool().run([lambda: 1]) == [1]
    with workers(3):
        assert pool().count == 3
        assert pool(5).count == 5  # an option of a pass that says more
    assert shares("abcde", 2) == [["a", "c", "e"], ["b", "d"]]
    assert shares("a", 2) == [["a"]]


def test_what_cannot_work_is_refused():
    with pytest.raises(DQError, match="at least 1"), workers(0):
        pass
    with pytest.raises(DQError, match="torchrun script.py"):
        over_ranks(lambda: None)


SCRIPT = """
import os, sys
from dq_plugins.workers import over_ranks, pool
rank = int(os.environ["RANK"])
def squares():
    assert rank == 0
    return pool().run([lambda i=i: (i * i, os.environ["RANK"]) for i in range(5)])
found = over_ranks(squares)
assert found == [(0, "0"), (1, "1"), (4, "0"), (9, "1"), (16, "0")], found
for bad in (lambda: 1 / 0, lambda: pool().run([int, lambda: 1 / 0])):
    try:
        over_ranks(bad)
    except ZeroDivisionError:
        print("raised")
"""


def test_ranks_share_tasks_and_every_rank_gets_the_result_or_the_error(tmp_path: Path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(tmp_path / "script.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("raised") == 4
