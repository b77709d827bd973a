"""Which components of a pipeline are denoisers, and putting another one in the place of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from torch import nn

from dq_plugins.errors import DQError, TimestepError
from dq_plugins.graph.arguments import find_timestep_argument

_USUAL_NAMES = ("unet", "transformer", "prior", "decoder")


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """The components that sampling calls with a timestep, by attribute name, those of usual names first.

    Several: experts for different timesteps (``transformer`` and ``transformer_2``), or a ControlNet beside a U-Net.
    Of several ControlNets in one component each is one: ``controlnet.nets.0``. A module that stands under two names
    is there under the first.
    """
    found: dict[str, nn.Module] = {}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and _takes_timestep(part):
            nets = getattr(part, "nets", None)
            together = isinstance(nets, nn.ModuleList)
            found |= {f"{name}.nets.{i}": net for i, net in enumerate(nets)} if together else {name: part}
    ordered = {name: found[name] for name in (*(n for n in _USUAL_NAMES if n in found), *found)}
    first = {id(part): name for name, part in reversed(ordered.items())}
    return {name: part for name, part in ordered.items() if first[id(part)] == name}


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """The component that sampling calls once a step: the one whose forward takes a timestep.

    Args:
        pipe: a diffusers pipeline.

    Returns:
        Its attribute name (``"unet"``, ``"transformer"``, ...) and the module.

    Raises:
        DQError: no component takes a timestep, or several do and none has a usual name.
    """
    found = denoisers_of(pipe)
    name = next(iter(found), "")
    if not found or (len(found) > 1 and name not in _USUAL_NAMES):
        modules = [name for name, part in pipe.components.items() if isinstance(part, nn.Module)]
        raise DQError(
            f"{type(pipe).__name__} has no single component that takes a timestep (found: "
            f"{', '.join(found) or 'none'}; components: {', '.join(modules) or 'none'}). Record the denoiser "
            "itself with dq_plugins.record."
        )
    return name, found[name]


def _takes_timestep(module: nn.Module) -> bool:
    try:
        find_timestep_argument(module)
    except TimestepError:
        return False
    return True


def place(pipe: Any, attribute: str, denoiser: nn.Module) -> nn.Module:
    """Put a denoiser in a place that `denoisers_of` names, and return the one that was there."""
    owner, _, leaf = attribute.rpartition(".")
    holder = attrgetter(owner)(pipe) if owner else pipe
    original = getattr(holder, leaf)
    if denoiser is not original:
        setattr(holder, leaf, denoiser)
    return original


@contextmanager
def placed(pipe: Any, attribute: str, denoiser: nn.Module) -> Iterator[None]:
    """`place`, for a while."""
    original = place(pipe, attribute, denoiser)
    try:
        yield
    finally:
        place(pipe, attribute, original)
