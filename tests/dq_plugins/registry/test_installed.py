from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

import pytest

from dq_plugins.registry import GROUPS
from dq_plugins.registry.installed import API_GROUP, discover, missing_requirements

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


def test_extras_and_every_group_are_read(workshop):
    lines = "".join(f"[{group}]\nx = m:X [a, b]\n" for group in GROUPS.values())
    workshop.install("Acme_DQ", lines, version="3.1")
    found = workshop.registry().plugins()
    assert [plugin.kind for plugin in found] == list(GROUPS)
    assert all(p.requires == ("acme-dq[a, b]",) and p.target == "m:X" for p in found)
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
    assert [plugin.name for plugin in found] == ["first"]


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
    lost = [plugin.target for plugin in discover() if plugin.built_in and plugin.location.line is None]
    assert lost == []


@pytest.fixture
def missing(workshop):
    workshop.install(
        "acme",
        version="2.0",
        metadata=(
            "Requires-Dist: never-looked-at\nRequires-Dist: neither; python_version >= '3'\n"
            "Provides-Extra: fast\nProvides-Extra: all\nProvides-Extra: old-name\nProvides-Extra: windows\n"
            "Requires-Dist: engine<3,>=2; extra == 'fast'\n"
            "Requires-Dist: acme[fast]; extra == 'all'\n"
            "Requires-Dist: acme[all]; extra == 'fast'\n"
            "Requires-Dist: absent; extra == 'old-name'\n"
            "Requires-Dist: absent; sys_platform == 'nowhere' and extra == 'windows'\n"
        ),
    )

    def ask(*extras, engine=None):
        if engine:
            workshop.install("engine", version=engine)
        return missing_requirements((f"acme[{','.join(extras)}]",))

    return ask


def test_no_extra_needs_nothing(missing):
    assert missing() == ""


def test_absent_distribution_is_named_with_the_pip_line(missing):
    assert missing("fast") == "it needs engine<3,>=2 (not installed). Install with: pip install 'acme[fast]'"


@pytest.mark.parametrize("version", ["2.0", "2.9.1+cpu", "2.5.dev20260101"])
def test_matching_version_is_enough(missing, version):
    assert missing("fast", engine=version) == ""


@pytest.mark.parametrize("version", ["1.9", "3.0"])
def test_wrong_version_is_named(missing, version):
    assert f"engine<3,>=2 (found {version})" in missing("fast", engine=version)


def test_extra_of_an_extra_is_followed_and_cycles_end(missing):
    assert "engine<3,>=2 (not installed)" in missing("all")


def test_extra_names_are_normalised(missing):
    assert "absent (not installed)" in missing("Old_Name")


def test_marker_of_another_platform_needs_nothing(missing):
    assert missing("windows") == ""


def test_extra_that_the_distribution_does_not_define_is_named(missing):
    assert "the extra 'fats', which distribution 'acme' does not define" in missing("fats")


def test_requirements_of_registered_code(workshop):
    workshop.install("engine", version="2.0")
    text = missing_requirements(("engine>=1", "engine>=3", "no good", "x; os_name == 'none'"))
    assert "engine>=3 (found 2.0)" in text
    assert "'no good', which is not a requirement" in text
    assert "engine>=1 (" not in text
    assert "(not installed)" not in text
