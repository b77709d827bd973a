"""Find where a plugin is written without running any of its code.

``importlib.util.find_spec("a.b")`` imports ``a``; here every level is looked up by its search path alone, and
the definition is found by parsing the file. A plugin of torchao is located without importing torchao.
"""

from __future__ import annotations

import ast
import importlib.util
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from dq_plugins.registry.record import Location


def find_module(module: str) -> ModuleSpec | None:
    """Spec of a dotted module name, found without importing its parent packages.

    Args:
        module: absolute dotted name, for example ``"dq_plugins.observers.minmax"``.

    Returns:
        The spec, or None if there is no such module.
    """
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # ValueError: the module is loaded and has no spec, such as __main__
        return None
    name = top
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec


def locate(module: str, attribute: str) -> Location:
    """File and line of an entry-point target.

    Args:
        module: absolute dotted name.
        attribute: name in that module; of a dotted one the first part is looked up.

    Returns:
        The location; the line is None when the attribute is not defined by a statement of the file.
    """
    spec = find_module(module)
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        return Location(None, None)
    if not spec.origin.endswith(".py"):
        return Location(spec.origin, None)
    return Location(spec.origin, _line_of(Path(spec.origin), attribute.partition(".")[0]))


def _line_of(file: Path, name: str) -> int | None:
    """Line of the last top-level statement of ``file`` that binds ``name``: the one that counts."""
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:
        return None
    found = [node.lineno for node in tree.body if name in _bound_names(node)]
    return found[-1] if found else None


def _bound_names(node: ast.stmt) -> set[str]:
    """Names that a top-level statement defines, assigns or imports."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
    return set()
