from __future__ import annotations

import sys

import pytest

from dq_plugins.registry.location import find_module, locate
from dq_plugins.registry.record import Location

SOURCE = """\
from math import tau as turn
import os.path

first: int = 1
a, b = 1, 2

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
    [("turn", 1), ("os", 2), ("b", 5), ("function", 7), ("Thing", 11), ("Thing.x", 11), ("first", 14)],
)
def test_definition_is_found_without_importing_the_package(package, name, line):
    assert locate("acme_pkg.mod", name) == Location(str(package / "mod.py"), line)
    assert "acme_pkg" not in sys.modules


@pytest.mark.parametrize("name", ["inner", "absent"])
def test_name_that_no_statement_binds_has_a_file_and_no_line(package, name):
    assert locate("acme_pkg.mod", name) == Location(str(package / "mod.py"), None)


@pytest.mark.parametrize("module", ["acme_pkg.absent", "acme_pkg.mod.deeper", "no_such_package_at_all.x"])
def test_missing_module_has_no_location(package, module):
    assert locate(module, "x") == Location(None, None)


def test_broken_file_has_no_line(package):
    (package / "mod.py").write_text("def (")
    assert locate("acme_pkg.mod", "x") == Location(str(package / "mod.py"), None)


def test_module_without_source_is_no_error():
    assert locate("sys", "path") == Location(None, None)
    assert find_module("__main__.x") is None


@pytest.mark.parametrize(
    ("location", "text"),
    [(Location("a.py", 3), "a.py:3"), (Location("a.so", None), "a.so"), (Location(None, None), "-")],
)
def test_location_reads_as_file_and_line(location, text):
    assert str(location) == text
