"""docs/upstream.md lists the private names of frameworks that the adapters use: all of them, and no others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PUBLIC = {"_fields"}  # of named tuples


def trees(folder: str) -> list[ast.AST]:
    return [ast.parse(file.read_text()) for file in sorted((ROOT / folder).rglob("*.py"))]


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def of_super(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"


def used(tree: ast.AST, own: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            if of_super(node):
                yield f"super().{node.attr}"
            elif node.attr not in own:
                yield node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", "") or ""
            parts = {part for alias in node.names for part in f"{module}.{alias.name}".split(".")}
            yield from (part for part in parts if private(part) and part not in own)


@pytest.mark.parametrize("folder", ["dq_torchao", "dq_diffusers", "dq_brevitas"])
def test_private_names_are_listed(folder):
    own = {name for each in ("dq_plugins", f"adapters/{folder}") for tree in trees(each) for name in defined(tree)}
    found = {name for tree in trees(f"adapters/{folder}") for name in used(tree, own)} - PUBLIC
    page = (ROOT / "docs" / "upstream.md").read_text()
    table = page.partition(f"| `{folder}` |")[2].partition("\n\n")[0]
    first_column = " ".join(line.split("|")[1] for line in table.splitlines()[2:])
    assert set(re.findall(r"`([^`]+)`", first_column)) == found
