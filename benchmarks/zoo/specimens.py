"""Every denoiser of the zoo, by family. The classes of diffusers are found by introspection, not by a list."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

from torch import nn

from benchmarks.zoo.controlnets import CONTROLNETS
from benchmarks.zoo.foreign import FOREIGN
from benchmarks.zoo.image_transformers import IMAGE_TRANSFORMERS
from benchmarks.zoo.per_token import PER_TOKEN
from benchmarks.zoo.specimen import Specimen
from benchmarks.zoo.unets import UNETS
from benchmarks.zoo.video_transformers import VIDEO_TRANSFORMERS
from dq_plugins.errors import TimestepError
from dq_plugins.graph.arguments import TIMESTEP_NAMES

FAMILIES: Mapping[str, Mapping[str, Specimen]] = {
    "U-Nets": UNETS,
    "transformers for images and sound": IMAGE_TRANSFORMERS,
    "transformers for video": VIDEO_TRANSFORMERS,
    "ControlNets": CONTROLNETS,
    "timesteps per token or frame": PER_TOKEN,
}
"""Specimens of diffusers' classes by family and class name."""


def diffusers_denoisers() -> dict[str, type[nn.Module]]:
    """Every class of ``diffusers.models`` whose forward takes a timestep, by name."""
    from diffusers import models

    found = {name: getattr(models, name) for name in dir(models)}
    return {name: each for name, each in found.items() if isinstance(each, type) and takes_timestep(each)}


def takes_timestep(cls: type) -> bool:
    """Whether a class is a module whose forward has an argument with a usual name for the timestep."""
    if not issubclass(cls, nn.Module):
        return False
    try:
        names = list(inspect.signature(cls.forward).parameters)
    except (TypeError, ValueError, TimestepError):
        return False
    return any(name in names for name in TIMESTEP_NAMES)


def every_specimen() -> Iterator[tuple[str, str, type[nn.Module], Specimen]]:
    """Family, name, class and specimen of every denoiser.

    Raises:
        LookupError: diffusers has a denoiser that the zoo does not know.
    """
    known = {name: (family, each) for family, names in FAMILIES.items() for name, each in names.items()}
    classes = diffusers_denoisers()
    if unknown := sorted(set(classes) - set(known)):
        raise LookupError(f"diffusers has denoisers that the zoo does not build: {', '.join(unknown)}")
    for name, (family, specimen) in known.items():
        yield family, name, classes[name.partition(",")[0]], specimen
    for cls, specimen in FOREIGN.items():
        yield "not of diffusers", cls.__name__, cls, specimen
