"""A denoiser run up to one of its modules, while others give the outputs that they gave before.

A module that has run is final: as long as nothing before it changes, what it gave once it would give again. So each
output is kept when it is first computed, and the next run takes it from there; only what lies between modules is
computed again. A call that changes its arguments, hands one of them on, or gives something else than tensors in plain
containers, is computed every time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.calibration.call import Call
from dq_plugins.graph.arguments import named_leaves
from dq_plugins.hooks import hooked
from dq_plugins.lookalike import Lookalike, change_class, lookalike
from dq_plugins.quantized.shelf import Shelf, restorable

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
INSTEAD = "_dq_instead"
"""Attribute of a module whose calls go elsewhere."""


class _Reached(Exception):  # noqa: N818
    """The module is about to run; the rest of the denoiser need not."""


class _Redirected(Lookalike):
    """First base of the class of a module whose calls go elsewhere, hooks and all."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[INSTEAD](super().__call__, args, kwargs)


@contextmanager
def redirected(modules: Mapping[str, nn.Module], instead: Callable[..., Any]) -> Iterator[None]:
    """Calls of modules become ``instead(name, call, args, kwargs)``; ``call(*args, **kwargs)`` is what they were.

    Modules whose class allows no subclass in its place are left alone.
    """
    with ExitStack() as stack:
        for name, module in modules.items():
            original = type(module)
            try:
                change_class(module, lookalike(original, _Redirected))
            except TypeError:
                continue
            stack.callback(change_class, module, original)
            vars(module)[INSTEAD] = lambda *call, name=name: instead(name, *call)
            stack.callback(vars(module).pop, INSTEAD)
        yield


class Replay:
    """Outputs of a denoiser's modules in some calls.

    Args:
        denoiser: what it computes with may change from run to run, but for modules that have run.
        modules: whose outputs are kept, by fully qualified name.
        shelf: where they are kept, under keys that begin with ``key``.
        key: tells apart what is kept on one shelf.
    """

    def __init__(self, denoiser: nn.Module, modules: list[str], shelf: Shelf, key: str) -> None:
        self.denoiser, self.shelf, self.key = denoiser, shelf, key
        self.modules = {name: denoiser.get_submodule(name) for name in modules}
        self._inner: dict[Any, Counter[str]] = {}  # runs of modules within a run that is replayed

    def arguments(self, name: str, place: int, call: Call) -> Arguments | None:
        """Arguments of a module's first run in a call, before its hooks; None where it does not run.

        Args:
            name: its fully qualified name.
            place: number of the call; outputs of one number are those of one call.
            call: the call.
        """
        seen: list[Arguments] = []
        runs: Counter[str] = Counter()

        def stop(_: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args, kwargs))
            raise _Reached

        def output(module: str, compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if module == name:  # stops, before its hooks
                return compute(*args, **kwargs)
            key = (self.key, place, module, runs[module])
            runs[module] += 1
            if key in self.shelf:
                runs.update(self._inner[key])
                return self.shelf.get(key)
            before, versions = runs.copy(), _versions(args, kwargs)
            found = compute(*args, **kwargs)
            if _versions(args, kwargs) == versions and restorable(found) and not _shared(found, args, kwargs):
                self._inner[key] = runs - before
                self.shelf.put(key, found)
            return found

        target = {name: self.denoiser.get_submodule(name)}
        stopping = hooked(target, before=stop, first=True)
        with redirected(self.modules, output), stopping, torch.no_grad(), suppress(_Reached):
            call.run(self.denoiser)
        return seen[0] if seen else None


def _tensors(*values: Any) -> list[Tensor]:
    return [each for _, each in named_leaves(dict(enumerate(values))) if isinstance(each, Tensor)]


def _versions(*values: Any) -> list[int]:
    return [each._version for each in _tensors(*values)]


def _shared(found: Any, *values: Any) -> bool:
    """Whether some of what a module gave is memory of what it was given."""
    given = {each.untyped_storage().data_ptr() for each in _tensors(*values)}
    return any(each.untyped_storage().data_ptr() in given for each in _tensors(found))
