"""Imports point one way: adapters -> dq_plugins, passes -> plan, graph, calibration, observers, and never back."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "dq_plugins"
FRAMEWORKS = {"torchao", "brevitas", "diffusers"}
ADAPTERS = {"dq_torchao", "dq_brevitas", "dq_diffusers", "adapters"}
ON_USE_ONLY = {"ortools", "matplotlib"}
ABOVE = ("passes", "recipe", "application", "report", "demo", "commands", "cli", "testing")
FOUNDATION = sorted(
    {path.stem for path in CORE.iterdir() if path.stem[0] != "_" and path.suffix in ("", ".py")} - {*ABOVE}
)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, by statement or by `importlib.import_module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def at_import(tree: ast.Module) -> ast.Module:
    """The tree without what runs only when a function is called or a type is checked."""

    class Remove(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef  # noqa: N815

        def visit_If(self, node):
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Remove().visit(tree)


def sources(*folders: Path) -> list[Path]:
    found = [file for folder in folders for file in ([folder] if folder.is_file() else folder.rglob("*.py"))]
    assert found, f"no Python file under {[str(folder) for folder in folders]}"
    return found


def trespasses(files: list[Path], forbidden: tuple[str, ...], *, only_at_import: bool = False) -> list[str]:
    """``file:line imports name`` for every import of a forbidden module or of a part of one."""
    found = []
    for file in files:
        tree = ast.parse(file.read_text(), str(file))
        for line, name in imports(at_import(tree) if only_at_import else tree):
            if any(name == each or name.startswith(f"{each}.") for each in forbidden):
                found.append(f"{file}:{line} imports {name}")
    return found


def test_core_never_imports_a_framework_or_an_adapter():
    assert trespasses(sources(CORE), (*FRAMEWORKS, *ADAPTERS)) == []


def test_core_imports_solvers_and_plots_on_use_only():
    assert trespasses(sources(CORE), tuple(ON_USE_ONLY), only_at_import=True) == []


@pytest.mark.parametrize("part", FOUNDATION)
def test_what_passes_stand_on_never_imports_what_stands_on_it(part):
    path = CORE / part if (CORE / part).is_dir() else CORE / f"{part}.py"
    assert trespasses(sources(path), tuple(f"dq_plugins.{part}" for part in ABOVE)) == []


def test_passes_never_import_the_command_line_or_the_conformance_suites():
    forbidden = ("dq_plugins.commands", "dq_plugins.cli", "dq_plugins.testing")
    assert trespasses(sources(CORE / "passes"), forbidden) == []


def test_registry_stands_on_errors_alone():
    everything = {f"dq_plugins.{file.stem}" for file in CORE.iterdir() if file.suffix == ".py" or file.is_dir()}
    allowed = {"dq_plugins.registry", "dq_plugins.errors"}
    assert trespasses(sources(CORE / "registry"), tuple(everything - allowed)) == []


@pytest.mark.parametrize(
    ("folder", "frameworks"),
    [
        ("dq_torchao", {"brevitas", "diffusers", "dq_brevitas", "dq_diffusers"}),
        ("dq_brevitas", {"torchao", "diffusers", "dq_torchao", "dq_diffusers"}),
        ("dq_diffusers", {"brevitas", "dq_brevitas"}),  # it saves and loads what dq_torchao quantizes
    ],
)
def test_adapter_imports_its_own_framework_only(folder, frameworks):
    assert trespasses(sources(ROOT / "adapters" / folder), tuple(frameworks)) == []


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("dq_torchao", ("diffusers", "meta_path", "_getframe", "currentframe", "f_back")),
        ("dq_diffusers", ("meta_path", "_getframe", "currentframe", "f_back")),
        ("dq_brevitas", ("diffusers", "meta_path", "_getframe", "currentframe", "f_back")),
    ],
)
def test_adapters_go_in_by_the_front_door(folder, words):
    found = [
        f"{file}:{number} has {word!r}"
        for file in sources(ROOT / "adapters" / folder)
        for number, line in enumerate(file.read_text().splitlines(), 1)
        for word in words
        if word in line.lower()
    ]
    assert found == []


def module_graph(roots: Iterable[Path]) -> nx.DiGraph:
    """An edge from each module to every module that it imports, wherever in its code: lazily and for types, too.

    Importing ``a.b.c`` runs ``a`` and ``a.b`` as well, which count unless the importer lies inside of them.

    Args:
        roots: folders of packages.
    """
    files = {_module(file, root.parent): file for root in roots for file in root.rglob("*.py")}
    graph = nx.DiGraph()
    for module, file in files.items():
        for _, name in imports(ast.parse(file.read_text(), str(file))):
            target = name if name in files else name.rpartition(".")[0]  # a module, or what one of them defines
            around = [package for package in _packages(target) if not f"{module}.".startswith(f"{package}.")]
            graph.add_edges_from((module, each) for each in (target, *around) if each in files and each != module)
    return graph


def _module(file: Path, base: Path) -> str:
    return ".".join(file.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def _packages(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def circles(graph: nx.DiGraph) -> list[list[str]]:
    """Groups of modules, and of the rooms beside each other in one package, that import each other in a circle."""
    found = [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1]
    for depth in range(1, 1 + max(module.count(".") for module in graph)):
        rooms = nx.DiGraph()
        for edge in graph.edges:
            a, b = (".".join(module.split(".")[:depth]) for module in edge)
            if a != b and a.rpartition(".")[0] == b.rpartition(".")[0]:
                rooms.add_edge(a, b)
        found += [sorted(circle) for circle in nx.strongly_connected_components(rooms) if len(circle) > 1]
    return found


def test_no_import_goes_in_a_circle():
    roots = [CORE, *(folder for folder in (ROOT / "adapters").iterdir() if folder.is_dir())]
    assert circles(module_graph(roots)) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.py": "import pkg.b", "b.py": ""}, []),
        ({"a.py": "import pkg.b", "b.py": "from pkg import a"}, [["pkg.a", "pkg.b"]]),
        ({"a.py": "import pkg.b", "b.py": "def f():\n    from pkg.a import x"}, [["pkg.a", "pkg.b"]]),
        ({"a.py": "import pkg.b", "b.py": "if TYPE_CHECKING:\n    from pkg.a import X"}, [["pkg.a", "pkg.b"]]),
        ({"one/a.py": "import pkg.two.b", "two/b.py": "", "two/c.py": "import pkg.one.d", "one/d.py": ""},
         [["pkg.one", "pkg.two"]]),
        ({"one/__init__.py": "import pkg.two", "two.py": "import pkg.one.a", "one/a.py": ""}, [["pkg.one", "pkg.two"]]),
    ],
)  # fmt: skip
def test_a_circle_is_caught(tmp_path, files, expected):
    for name, source in files.items():
        file = tmp_path / "pkg" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    found = circles(module_graph([tmp_path / "pkg"]))
    assert [circle for circle in expected if circle not in found] == []
    assert bool(found) is bool(expected)


def test_imports_are_absolute_so_that_these_tests_see_them():
    found = [
        f"{file}:{line}"
        for file in sources(CORE, ROOT / "adapters")
        for line, name in imports(ast.parse(file.read_text()))
        if name.startswith(".")
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "only_at_import", "caught"),
    [
        ("import torchao.quantization", False, True),
        ("from torchao import quantize_", False, True),
        ("def f():\n    import torchao", False, True),
        ("def f():\n    import torchao", True, False),
        ("class C:\n    import torchao", True, True),
        ("if TYPE_CHECKING:\n    import torchao", True, False),
        ("try:\n    import torchao\nexcept ImportError:\n    pass", True, True),
        ("import importlib\nimportlib.import_module('torchao.x')", False, True),
        ("import torchaoless", False, False),
        ("torchao = 'import torchao'", False, False),
    ],
)
def test_a_trespass_is_caught(tmp_path, source, only_at_import, caught):
    file = tmp_path / "sample.py"
    file.write_text(source)
    assert bool(trespasses([file], ("torchao",), only_at_import=only_at_import)) is caught
