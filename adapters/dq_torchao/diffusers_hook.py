"""Tells diffusers about our configs as soon as diffusers' table of quantizers exists, and not before.

``from_pretrained`` finds quantizers in a plain dict of ``diffusers.quantizers.auto``. Importing that module takes
seconds, which a script without diffusers should not pay; asking users for a second import would make a forgotten line a
wrong result. So the entry is made when the module is imported, by whoever imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

TABLE = "diffusers.quantizers.auto"


class _WhenImported(MetaPathFinder):
    """Finds `TABLE` once, the usual way, and registers after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register(module: Any) -> None:
    from dq_diffusers.registration import register_quantizer

    register_quantizer(module.AUTO_QUANTIZER_MAPPING)


def register_when_imported() -> None:
    """Make the entry now, or when diffusers' table is imported; a second call changes nothing."""
    if TABLE in sys.modules:
        _register(sys.modules[TABLE])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())
