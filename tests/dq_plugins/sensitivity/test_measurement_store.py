from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dq_plugins.errors import DQError
from dq_plugins.progress import finish
from dq_plugins.sensitivity.measure import measure
from dq_plugins.sensitivity.measurement_store import ENTRIES, Store


class Counting:
    """A measurement that writes a line to a file whenever it measures, so that other processes' work is seen too."""

    def __init__(self, log: Path, count: int, seconds: float = 0.0) -> None:
        self.log, self.count, self.seconds = log, count, seconds

    def units(self) -> list[str]:
        return [str(i) for i in range(self.count)]

    def __call__(self, unit: str) -> dict[str, float]:
        with self.log.open("a") as file:
            file.write(unit + "\n")
        time.sleep(self.seconds)
        return {unit: float(unit) ** 2, "signal": 1.0, "calls": 1.0}

    def measured(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []


def test_finished_units_are_not_measured_again(tmp_path):
    measurement, store = Counting(tmp_path / "log", 5), Store(tmp_path, {"model": "a"})
    first = finish(measure(measurement, store=store))
    assert finish(measure(measurement, store=Store(tmp_path, {"model": "a"}))) == first
    assert measurement.measured() == ["0", "1", "2", "3", "4"]
    assert first["3"] == {"3": 9.0, "signal": 1.0, "calls": 1.0}


def test_another_signature_is_another_store(tmp_path):
    measurement = Counting(tmp_path / "log", 2)
    for model in ("a", "b"):
        finish(measure(measurement, store=Store(tmp_path, {"model": model})))
    assert len(measurement.measured()) == 4


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    measurement, store = Counting(tmp_path / "log", 3), Store(tmp_path, {})
    finish(measure(measurement, store=store))
    path = store.folder / ENTRIES
    path.write_bytes(path.read_bytes()[:-10])
    assert set(store.read()) == {"0", "1"}
    assert set(finish(measure(measurement, store=store))) == {"0", "1", "2"}
    assert measurement.measured() == ["0", "1", "2", "2"]


def test_a_damaged_line_is_refused(tmp_path):
    store = Store(tmp_path, {})
    store.add("0", {"signal": 1.0})
    path = store.folder / ENTRIES
    path.write_bytes(b"what is this\n" + path.read_bytes())
    with pytest.raises(DQError, match=r"entries\.jsonl:1 cannot be read as JSON"):
        store.read()


def test_an_altered_value_is_refused(tmp_path):
    store = Store(tmp_path, {})
    store.add("0", {"signal": 1.0})
    path = store.folder / ENTRIES
    path.write_bytes(path.read_bytes().replace(b'"signal": 1.0', b'"signal": 2.0'))
    with pytest.raises(DQError, match=r"entries\.jsonl:2 was altered"):
        store.read()


def test_what_a_full_disk_took_counts_as_nothing(tmp_path, monkeypatch):
    store, write = Store(tmp_path, {}), os.write
    store.add("0", {"signal": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, data[:30]))
        with pytest.raises(DQError, match="disk is full"):
            store.add("1", {"signal": 1.0})
    store.add("2", {"signal": 1.0})
    assert set(store.read()) == {"0", "2"}


def test_another_release_measures_again(tmp_path, monkeypatch):
    Store(tmp_path, {}).add("0", {"signal": 1.0})
    monkeypatch.setattr("dq_plugins.sensitivity.measurement_store.__version__", "99.0")
    assert Store(tmp_path, {}).read() == {}


def test_a_unit_is_claimed_once(tmp_path):
    one, two = Store(tmp_path, {}), Store(tmp_path, {})
    assert one.claim("a")
    assert not two.claim("a")
    assert two.claim("b")


def test_workers_share_the_work_and_repeat_none_of_it(tmp_path):
    measurement = Counting(tmp_path / "log", 12, 0.01)
    found = finish(measure(measurement, store=Store(tmp_path, {}), workers=2))
    assert list(found) == measurement.units()
    assert sorted(measurement.measured(), key=int) == measurement.units()


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_measurement_store import Counting
from dq_plugins.progress import finish
from dq_plugins.sensitivity.measure import measure
from dq_plugins.sensitivity.measurement_store import Store
folder = Path(sys.argv[1])
finish(measure(Counting(folder / "log", 30, 0.05), store=Store(folder, {})))
"""


def test_killed_and_restarted_it_repeats_at_most_one_unit(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), str(Path(__file__).parent)])
    measurement = Counting(tmp_path / "log", 30)
    deadline = time.monotonic() + 60
    while len(measurement.measured()) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 6 <= len(measurement.measured()) < 30
    found = finish(measure(measurement, store=Store(tmp_path, {})))
    assert len(found) == 30
    assert len(measurement.measured()) <= 31


def test_claims_of_dead_workers_are_dropped_and_results_kept(tmp_path):
    store = Store(tmp_path, {})
    store.claim("0")
    store.claim("1")
    store.add("1", {"signal": 1.0})
    store.drop_claims()
    assert store.claim("0")
    assert not store.claim("1")
