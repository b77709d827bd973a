"""Starting must not pay for frameworks, solvers or plots that are not used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ["torchao", "brevitas", "diffusers", "transformers", "ortools", "matplotlib", "torchmetrics", "pytest"]
IMPORT_ALL = """
import importlib, pkgutil, dq_plugins
for module in pkgutil.walk_packages(dq_plugins.__path__, "dq_plugins."):
    importlib.import_module(module.name)
"""


def heavy_modules_after(code: str) -> list[str]:
    """Which heavy packages a fresh interpreter has imported once it ran ``code``."""
    report = f"\nimport json, sys\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import dq_plugins; dq_plugins.names('adapter')", id="package"),
        pytest.param(IMPORT_ALL, id="every module"),
        pytest.param("from dq_plugins.cli import main; main(['list', '--load', 'none'])", id="list"),
    ],
)
def test_nothing_heavy_is_imported(code):
    assert heavy_modules_after(code) == []


def test_this_test_can_fail():
    assert heavy_modules_after("import matplotlib") == ["matplotlib"]
