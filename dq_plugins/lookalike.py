"""Classes made on the fly that take the place of a module's own: the one way to change how a module is called that
tools which set, wrap or restore the ``forward`` of the instance do not undo."""

from __future__ import annotations

from collections.abc import Callable
from types import new_class
from typing import Any

from torch import nn


class Lookalike:
    """Base of the first base of such a class."""

    _dq_original: type[nn.Module]
    _dq_made_by: Callable[[type[nn.Module]], type[nn.Module]] | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Nothing: an original class may keep a list of its subclasses, and this is not a kind of its own."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles: a class made on the fly cannot be found by its name, the original can."""
        make, args, *rest = super().__reduce_ex__(protocol)
        original, makers = type(self), []
        while (maker := getattr(original, "_dq_made_by", None)) is not None:
            makers.append(maker)
            original = original._dq_original
        args = tuple(original if each is type(self) else each for each in args)
        return (_made_again, (original, tuple(reversed(makers)), make, args), *rest)


Maker = Callable[[type[nn.Module]], type[nn.Module]]
"""Gives the class that stands for another; always the same one."""


def _made_again(
    original: type[nn.Module], makers: tuple[Maker, ...], make: Callable[..., nn.Module], args: tuple[Any, ...]
) -> nn.Module:
    module = make(*args)
    for maker in makers:
        original = maker(original)
    change_class(module, original)
    return module


def known_lookalike(original: type[nn.Module], maker: Maker) -> type[nn.Module] | None:
    """The class that ``maker`` has made of ``original`` before."""
    for known in original.__subclasses__():
        if known.__dict__.get("_dq_original") is original and getattr(known, "_dq_made_by", None) is maker:
            return known
    return None


def lookalike(
    original: type[nn.Module], first: type[Lookalike], made_by: Maker | None = None, **attributes: Any
) -> type[nn.Module]:
    """A subclass of ``original`` that goes by its name, for ``module.__class__``.

    Args:
        original: the module's class.
        first: what overrides it.
        made_by: what makes it again, for copies and pickles of a module; an importable function.
        attributes: of the new class.
    """
    if made_by is not None:
        attributes |= {"_dq_original": original, "_dq_made_by": staticmethod(made_by)}
    like = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return new_class(original.__name__, (first, original), {}, lambda body: body.update(like | attributes))


def change_class(module: nn.Module, to: type[nn.Module]) -> None:
    """Make ``module`` an instance of a class of the same layout, whatever its class thinks of setting attributes.

    Raises:
        TypeError: the layouts differ.
    """
    object.__setattr__(module, "__class__", to)
