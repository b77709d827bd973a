from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

import pytest

from dq_plugins.registry.discovery import discover
from dq_plugins.registry.record import API_GROUP, GROUPS

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


def test_extras_and_every_group_are_read(workshop):
    lines = "".join(f"[{group}]\nx = m:X [a, b]\n" for group in GROUPS.values())
    workshop.install("Acme_DQ", lines, version="3.1")
    found = workshop.registry().plugins()
    assert [plugin.kind for plugin in found] == list(GROUPS)
    assert all(p.declaration.extras == ("a", "b") and p.declaration.target == "m:X" for p in found)
    assert {(p.distribution, p.version) for p in found} == {("acme-dq", "3.1")}


def test_unreadable_distribution_hides_no_other(workshop, caplog):
    workshop.install("acme", "[dq_plugins.metrics]\nflux = m:f\n")
    broken = workshop.site / "wreck-1.0.dist-info"
    broken.mkdir()
    (broken / "entry_points.txt").write_text("[dq_plugins.metrics]\nx = m:x\n")  # and no METADATA at all
    assert workshop.registry().names("metric") == ["flux"]
    assert "wreck" in caplog.text


def test_first_of_two_copies_on_the_path_counts(workshop, tmp_path):
    workshop.install("acme", "[dq_plugins.metrics]\nfirst = m:f\n")
    workshop.site = tmp_path / "later"
    workshop.install("acme", "[dq_plugins.metrics]\nsecond = m:f\n", version="2.0")
    found = discover(distributions(path=[str(tmp_path), str(workshop.site)]))
    assert [declaration.name for declaration in found] == ["first"]


def test_installed_metadata_is_that_of_this_checkout():
    """An editable installation keeps the entry points of the day it was made."""
    try:
        installed = distribution("dq-plugins")
    except PackageNotFoundError:
        pytest.skip("dq-plugins is not installed")
    tomllib = pytest.importorskip("tomllib", reason="in the standard library since Python 3.11")
    declared = tomllib.loads(PYPROJECT.read_text())["project"].get("entry-points", {})
    for group in [*GROUPS.values(), API_GROUP]:
        found = {entry.name: entry.value for entry in installed.entry_points if entry.group == group}
        assert found == declared.get(group, {}), (
            f"entry points of group {group} changed since dq-plugins was installed: run "
            "`pip install --no-deps --no-build-isolation -e .` in this folder"
        )


def test_every_built_in_declaration_is_found_on_disk():
    built_in = [declaration for declaration in discover() if declaration.built_in]
    from dq_plugins.registry.location import locate

    lost = [d.target for d in built_in if locate(d.module, d.attribute).line is None]
    assert lost == []
