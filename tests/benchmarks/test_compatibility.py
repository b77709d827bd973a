from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks.compatibility import smoke, table
from benchmarks.compatibility.environments import environments, interpreter

ROOT = Path(__file__).parents[2]
STAGES = dict.fromkeys(smoke.STAGES, "ok")
VERSIONS = dict.fromkeys(("python", *smoke.PACKAGES), "1.0")


def requirements(file: str) -> list[Requirement]:
    lines = (ROOT / file).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_python_has_one_constraint_a_package(python):
    chosen = [each.name for each in requirements("constraints.txt") if holds(each, python)]
    assert len(chosen) == len(set(chosen))
    assert {"torch", "torchao", "brevitas", "diffusers", "numpy", "scipy"} <= set(chosen)


def holds(requirement: Requirement, python: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})


def test_every_python_of_the_classifiers_is_tried():
    claimed = re.findall(r"Python :: (3\.\d+)\"", (ROOT / "pyproject.toml").read_text())
    assert {each.python for each in environments()} == set(claimed)


def test_the_oldest_environment_is_as_old_as_the_pins():
    text = (ROOT / "pyproject.toml").read_text()
    oldest = next(iter(environments()))
    for package, version in oldest.releases:
        (least,) = set(re.findall(rf'"{package}>=([\d.]+)', text))
        assert version in (least, f"{least}.0")


def test_an_interpreter_is_found_by_its_version():
    version = "{}.{}".format(*sys.version_info)
    found = interpreter(version)
    assert found is not None
    printed = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    assert printed.startswith(f"Python {version}.")
    assert interpreter("3.99") is None


def test_what_fails_is_told_apart_from_what_is_absent():
    def wrong() -> None:
        raise ValueError("seven")

    def absent() -> None:
        import no_such_package  # noqa: F401

    assert smoke.outcome(wrong).startswith("ValueError: seven (test_compatibility.py:")
    assert smoke.outcome(absent) == "absent"
    assert smoke.outcome(lambda: None) == "ok"


def test_the_table_says_what_does_not_work():
    rows = table.table(
        {
            "whole": {"versions": VERSIONS, "stages": STAGES},
            "part": {"versions": VERSIONS, "stages": STAGES | {"pt2e": "ValueError: a | b"}},
            "none": {"failed": "no Python 3.9 on this machine"},
        }
    ).splitlines()
    assert rows[2].endswith("| all |")
    assert f"| {len(STAGES) - 1} of {len(STAGES)}; not `pt2e`: `ValueError: a / b` |" in rows[3]
    assert "not made: `no Python 3.9 on this machine`" in rows[4]
    assert len({row.count("|") for row in rows}) == 1
