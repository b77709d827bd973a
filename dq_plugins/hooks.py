"""Forward hooks on several modules for the length of a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Before = Callable[[str, tuple[Any, ...], dict[str, Any]], Arguments | None]
After = Callable[[str, tuple[Any, ...], dict[str, Any], Any], Any]


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], *, before: Before | None = None, after: After | None = None, first: bool = False
) -> Iterator[None]:
    """Call functions around every call of some modules; all hooks are gone afterwards, whatever happens inside.

    Args:
        modules: by the name that the functions are told.
        before: ``before(name, args, kwargs)``; None leaves the arguments as they are, a pair replaces them.
        after: ``after(name, args, kwargs, output)``; None leaves the output as it is, anything else replaces it.
        first: ``before`` runs before all hooks that are there already, those that quantize the input among them.

    Example:
        >>> import torch
        >>> seen, layer = [], nn.Linear(2, 3)
        >>> with hooked({"layer": layer}, after=lambda name, args, kwargs, output: seen.append((name, output.shape))):
        ...     _ = layer(torch.zeros(1, 2))
        >>> seen
        [('layer', torch.Size([1, 3]))]
    """
    with ExitStack() as stack:
        for name, module in modules.items():
            if before is not None:
                hook = partial(_call, name, before)
                stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first))
            if after is not None:
                stack.enter_context(module.register_forward_hook(partial(_call, name, after), with_kwargs=True))
        yield


def _call(name: str, function: Callable[..., Any], _: nn.Module, *call: Any) -> Any:
    return function(name, *call)
