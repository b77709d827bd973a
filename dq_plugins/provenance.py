"""Which code computes: releases, and hashes of the sources, so that results of other code are told apart.

A release alone does not tell: a development install keeps its version while its files change.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from functools import cache
from importlib.metadata import version
from pathlib import Path

from dq_plugins.registry import Plugin
from dq_plugins.version import __version__

PACKAGES = ("dq_plugins", "dq_torchao", "dq_brevitas", "dq_diffusers")


@cache
def library_code() -> dict[str, str]:
    """What every result depends on: this library, with its adapters, and torch."""
    return {"dq-plugins": f"{__version__} ({source_hash(*PACKAGES)})", "torch": version("torch")}


def plugin_code(plugin: Plugin) -> str:
    """Where a loaded plugin comes from: distribution, version, and a hash of its package, or of its own source."""
    if plugin.built_in:
        return ""
    if plugin.distribution is None:
        return f"this process ({_own_source(plugin.loaded)})"
    return f"{plugin.distribution} {plugin.version} ({source_hash(plugin.target.partition(':')[0].partition('.')[0])})"


def source_hash(*packages: str) -> str:
    """Hash of the Python files of top-level packages, those that are not installed left out: 12 digits."""
    digest = hashlib.sha256()
    for package in packages:
        for name, path in _sources(package):
            digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def _sources(package: str) -> list[tuple[str, Path]]:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # ValueError: a module made by hand, without a spec
        return []
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    files = [(str(path.relative_to(folder)), path) for folder in folders for path in folder.rglob("*.py")]
    if not folders and spec is not None and spec.origin and Path(spec.origin).is_file():
        files = [(package, Path(spec.origin))]
    return [(f"{package}/{name}", path) for name, path in sorted(files)]


def _own_source(obj: object) -> str:
    try:
        text = inspect.getsource(obj if hasattr(obj, "__qualname__") else type(obj))  # type: ignore[arg-type]
    except (OSError, TypeError):  # typed into an interpreter
        return "unknown"
    return hashlib.sha256(text.encode()).hexdigest()[:12]
