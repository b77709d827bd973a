"""The example plugin is installed into a fresh environment, listed there, and used there by its own tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sysconfig
import venv
from importlib.metadata import entry_points
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "example_plugin"


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Interpreter of a new virtual environment that holds the example and sees the packages of this one."""
    already = {entry.name for entry in entry_points(group="dq_plugins.observers")}
    assert "three-sigma" not in already, "uninstall dq-plugins-example here: this test installs it by itself"
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # addsitedir reads the .pth files there too, so an editable dq-plugins is seen like an installed one.
    theirs = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "_outer.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in sorted(theirs)))
    interpreter = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [interpreter, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    call([*install, "--disable-pip-version-check", EXAMPLE])
    return interpreter


def call(command: list[str | Path], **options) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DQ_PLUGINS")}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_listed(python):
    listed = json.loads(call([python, "-m", "dq_plugins.cli", "list", "--json"]))
    theirs = {plugin["name"]: plugin for plugin in listed if plugin["distribution"] == "dq-plugins-example"}
    assert {(plugin["kind"], name) for name, plugin in theirs.items()} == {
        ("observer", "three-sigma"),
        ("pass", "keep-small-layers"),
    }
    for plugin in theirs.values():
        assert (plugin["state"], plugin["version"]) == ("ok", "0.1.0")
        assert "class " in Path(plugin["file"]).read_text().splitlines()[plugin["line"] - 1]


def test_its_observer_and_its_pass_are_used_by_its_own_tests(python):
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    said = call([*command, EXAMPLE / "tests"], cwd=python.parent)
    passed = re.search(r"(\d+) passed in ", said)
    assert passed, said
    assert int(passed[1]) > 30  # two conformance suites, and what the observer and the pass are for
    assert "skipped" not in said
