from __future__ import annotations

import pytest

from dq_plugins.registry.record import Declaration
from dq_plugins.registry.requirements import missing_requirements


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
        return missing_requirements(Declaration("metric", "m", "a:b", "acme", "2.0", extras=extras))

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
    here = Declaration("metric", "m", "a:b", requires=("engine>=1", "engine>=3", "no good", "x; os_name == 'none'"))
    text = missing_requirements(here)
    assert "engine>=3 (found 2.0)" in text
    assert "'no good', which is not a requirement" in text
    assert "engine>=1 (" not in text
    assert "(not installed)" not in text
