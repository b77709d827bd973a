"""One name, one thing: no two classes of the product have the same name, and no two modules of one package."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = [ROOT / "dq_plugins", *sorted(path.parent for path in (ROOT / "adapters").glob("*/__init__.py"))]
OPTIONS = "Options"
"""Every pass has its own, as an attribute."""
ATTENTION = "attention"
"""What a plan says of it is in ``plan/``, how it is simulated in ``quantized/``."""


def repeated(places: dict[str, list[Path]]) -> dict[str, list[str]]:
    return {name: [str(p.relative_to(ROOT)) for p in found] for name, found in places.items() if len(found) > 1}


def test_no_two_classes_have_one_name():
    places = defaultdict(list)
    for package in PACKAGES:
        for file in sorted(package.rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ClassDef) and node.name != OPTIONS:
                    places[node.name].append(file)
    assert len(places) > 200
    assert repeated(places) == {}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_no_two_modules_of_a_package_have_one_name(package):
    places = defaultdict(list)
    for file in sorted(package.rglob("*.py")):
        commands = "commands" in file.relative_to(package).parts  # these are named as they are typed
        if file.stem not in ("__init__", ATTENTION) and not commands:
            places[file.stem].append(file)
    assert places
    assert repeated(places) == {}
