from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from dq_plugins.artifact import UnitResults
from dq_plugins.progress import finish
from dq_plugins.sensitivity.measure import MEASURED, measure


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


def kept(folder: Path, **settings) -> UnitResults:
    return UnitResults(MEASURED, folder / "kept", settings)


def test_finished_units_are_not_measured_again(tmp_path):
    measurement = Counting(tmp_path / "log", 5)
    first = finish(measure(measurement, kept(tmp_path, model="a")))
    assert finish(measure(measurement, kept(tmp_path, model="a"))) == first
    assert measurement.measured() == ["0", "1", "2", "3", "4"]
    assert first["3"] == {"3": 9.0, "signal": 1.0, "calls": 1.0}


def test_results_of_other_settings_are_not_taken(tmp_path):
    measurement = Counting(tmp_path / "log", 2)
    for model in ("a", "b"):
        finish(measure(measurement, kept(tmp_path, model=model)))
    assert len(measurement.measured()) == 4


def test_a_damaged_unit_is_measured_again_and_no_other(tmp_path):
    measurement, results = Counting(tmp_path / "log", 3), kept(tmp_path)
    first = finish(measure(measurement, results))
    results.path("2").write_bytes(results.path("2").read_bytes()[:-10])
    results.path("1").write_bytes(results.path("1").read_bytes().replace(b"signal", b"signet"))
    assert finish(measure(measurement, results)) == first
    assert measurement.measured() == ["0", "1", "2", "1", "2"]


def test_workers_share_the_work_and_repeat_none_of_it(tmp_path):
    measurement = Counting(tmp_path / "log", 12, 0.01)
    finish(measure(Counting(tmp_path / "log", 2), kept(tmp_path)))
    found = finish(measure(measurement, kept(tmp_path), workers=2))
    assert list(found) == measurement.units()
    assert sorted(measurement.measured(), key=int) == measurement.units()
    assert finish(measure(measurement, kept(tmp_path))) == found
    assert len(measurement.measured()) == 12  # what the workers found was kept


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_measure import Counting, kept
from dq_plugins.progress import finish
from dq_plugins.sensitivity.measure import measure
folder = Path(sys.argv[1])
finish(measure(Counting(folder / "log", 30, 0.05), kept(folder)))
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
    found = finish(measure(measurement, kept(tmp_path)))
    assert len(found) == 30
    assert len(measurement.measured()) <= 31
