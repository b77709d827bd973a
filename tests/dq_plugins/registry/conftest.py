"""Distributions made of a few files, on ``sys.path`` for the time of one test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType

import pytest

from dq_plugins import registry
from dq_plugins.registry import store
from dq_plugins.registry.installed import discover


class Workshop:
    """Makes installed distributions, and lets the registry see them and nothing else."""

    def __init__(self, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site, self.monkeypatch = site, monkeypatch
        monkeypatch.syspath_prepend(site)

    def install(
        self,
        name: str,
        entry_points: str = "",
        *,
        version: str = "1.0",
        metadata: str = "",
        modules: dict[str, str] | None = None,
    ) -> None:
        """Write ``name``'s metadata and modules; ``metadata`` holds further header lines."""
        info = self.site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}")
        (info / "entry_points.txt").write_text(entry_points)
        for module, source in (modules or {}).items():
            file = self.site / f"{module}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)

    def registry(self) -> ModuleType:
        """The registry, which knows what was installed here, and nothing of it loaded."""
        here = discover(distributions(path=[str(self.site)]))
        self.monkeypatch.setattr(store, "_plugins", store.by_name(here))
        return registry

    def allow(self, terms: str) -> None:
        """Set ``DQ_PLUGINS``."""
        self.monkeypatch.setenv("DQ_PLUGINS", terms)


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    before = set(sys.modules)
    yield Workshop(tmp_path, monkeypatch)
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def one_metric(workshop: Workshop) -> Callable[..., ModuleType]:
    """Install ``acme`` with the metric ``flux`` and give the registry."""

    def make(source: str = "flux = object()", **options: str) -> ModuleType:
        entry_points = "[dq_plugins.metrics]\nflux = acme_flux:flux\n" + options.pop("more", "")
        workshop.install("acme", entry_points, modules={"acme_flux": source}, **options)
        return workshop.registry()

    return make
