from __future__ import annotations

import sys
from types import ModuleType

import pytest

from dq_plugins.registry.plugin import Location, locate, summary_at

SOURCE = """\
from math import tau as turn
import os.path

first: int = 1

def function():
    inner = 1

@object.__init_subclass__
class Thing:
    pass

first = 2
"""


@pytest.fixture
def package(workshop):
    workshop.install("acme", modules={"acme_pkg/__init__": "raise AssertionError('imported')", "acme_pkg/mod": SOURCE})
    return workshop.site / "acme_pkg"


@pytest.mark.parametrize(
    ("name", "line"),
    [("turn", 1), ("os", 2), ("function", 6), ("Thing", 10), ("Thing.x", 10), ("first", 13)],
)
def test_definition_is_found_without_importing_the_package(package, name, line):
    assert locate(f"acme_pkg.mod:{name}") == Location(str(package / "mod.py"), line)
    assert "acme_pkg" not in sys.modules


@pytest.mark.parametrize("name", ["inner", "absent"])
def test_name_that_no_statement_binds_has_a_file_and_no_line(package, name):
    assert locate(f"acme_pkg.mod:{name}") == Location(str(package / "mod.py"), None)


@pytest.mark.parametrize("module", ["acme_pkg.absent", "acme_pkg.mod.deeper", "no_such_package_at_all.x"])
def test_missing_module_has_no_location(package, module):
    assert locate(f"{module}:x") == Location()


def test_package_and_single_module_are_found(package):
    assert locate("acme_pkg:x").file == str(package / "__init__.py")
    (package.parent / "acme_single.py").write_text("x = 1")
    assert locate("acme_single:x") == Location(str(package.parent / "acme_single.py"), 1)


def test_module_without_source_or_spec_is_not_an_error(monkeypatch):
    assert locate("sys:path") == Location()
    monkeypatch.setitem(sys.modules, "made_by_hand", ModuleType("made_by_hand"))
    assert locate("made_by_hand:x") == Location()


def test_loaded_module_is_found_by_its_file_as_a_script_is(package, monkeypatch):
    script = ModuleType("script")
    script.__file__ = str(package / "mod.py")
    monkeypatch.setitem(sys.modules, "script", script)
    assert locate("script:function") == Location(script.__file__, 6)


@pytest.mark.parametrize(
    ("location", "text"),
    [(Location("a.py", 3), "a.py:3"), (Location("a.so", None), "a.so"), (Location(), "-")],
)
def test_location_reads_as_file_and_line(location, text):
    assert str(location) == text


@pytest.mark.parametrize(
    ("source", "summary"),
    [
        ('class it:\n    """Does this.\n\n    And more."""', "Does this"),
        ('def it():\n    """Does that."""', "Does that"),
        ("def it(): ...", ""),
        ('it = Recipe("it", "for " "this", ())', "for this"),
        ("from elsewhere import it", ""),
        ("it = ", ""),
    ],
)
def test_summary_is_read_from_the_definition(tmp_path, source, summary):
    file = tmp_path / "module.py"
    file.write_text(source)
    assert summary_at(Location(str(file), 1), "it") == summary
