"""Classes made on the fly that take the place of a module's own: the one way to change how a module is called that
tools which set, wrap or restore the ``forward`` of the instance do not undo."""

from __future__ import annotations

from types import new_class
from typing import Any

from torch import nn


class Lookalike:
    """Base of the first base of such a class."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Nothing: an original class may keep a list of its subclasses, and this is not a kind of its own."""


def lookalike(original: type[nn.Module], first: type[Lookalike], **attributes: Any) -> type[nn.Module]:
    """A subclass of ``original`` that goes by its name, for ``module.__class__``.

    Args:
        original: the module's class.
        first: what overrides it.
        attributes: of the new class.
    """
    like = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return new_class(original.__name__, (first, original), {}, lambda body: body.update(like | attributes))


def change_class(module: nn.Module, to: type[nn.Module]) -> None:
    """Make ``module`` an instance of a class of the same layout, whatever its class thinks of setting attributes.

    Raises:
        TypeError: the layouts differ.
    """
    object.__setattr__(module, "__class__", to)
