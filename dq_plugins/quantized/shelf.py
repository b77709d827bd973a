"""Nested tensors on disk for the length of a computation: what is taken out is what was put in, layout included."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dq_plugins.artifact.files import read_tensors
from dq_plugins.errors import DQError
from dq_plugins.graph.arguments import map_leaves


@dataclass(frozen=True)
class _Stored:
    """Where the memory of a tensor lies in the file, and how it is laid out."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device

    def read(self, tensors: dict[str, Tensor]) -> Tensor:
        return tensors[self.name].to(self.device).as_strided(self.shape, self.stride)


class Shelf:
    """Values by key, one safetensors file each.

    Args:
        folder: an empty folder, or one to make.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._values: dict[Hashable, tuple[Path, Any]] = {}
        self._count = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a copy of a value.

        Args:
            key: of no value that is here.
            value: tensors, in lists, tuples and dictionaries; anything else in them is kept as it is.

        Raises:
            DQError: the disk is full, or the folder may not be written.
        """
        tensors: dict[str, Tensor] = {}
        known: dict[int, _Stored] = {}  # one tensor in two places is one tensor again

        def leaf(name: str, each: Any) -> Any:
            if not isinstance(each, Tensor):
                return each
            if id(each) not in known:
                known[id(each)] = _Stored(name, tuple(each.shape), each.stride(), each.device)
                tensors[name] = _memory(each)
            return known[id(each)]

        layout = map_leaves({"value": value}, leaf)["value"]
        file = self.folder / f"{self._count:06d}.safetensors"
        self._count += 1
        try:
            safetensors.torch.save_file(tensors, file)
        except (OSError, SafetensorError) as error:
            raise DQError(f"{file} cannot be written: {error}. Finished units are kept.") from error
        self._values[key] = file, layout

    def get(self, key: Hashable) -> Any:
        """The value of a key.

        Raises:
            KeyError: there is none.
        """
        file, layout = self._values[key]
        _, tensors = read_tensors(file)  # not mapped: kernels round by where a tensor lies
        read: dict[str, Tensor] = {}

        def leaf(_: str, each: Any) -> Any:
            if not isinstance(each, _Stored):
                return each
            if each.name not in read:
                read[each.name] = each.read(tensors)
            return read[each.name]

        return map_leaves({"value": layout}, leaf)["value"]

    def discard(self, unwanted: Callable[[Any], bool]) -> None:
        """Throw away the values of some keys."""
        for key in [key for key in self._values if unwanted(key)]:
            self._values.pop(key)[0].unlink()


def restorable(value: Any) -> bool:
    """Whether a value that is taken out is of the types of the one that was put in."""
    if isinstance(value, list | tuple | dict):
        plain = type(value) in (list, tuple, dict) or hasattr(value, "_fields")
        return plain and all(restorable(each) for each in (value.values() if isinstance(value, dict) else value))
    if isinstance(value, Tensor):
        return type(value) is Tensor and value.layout is torch.strided
    return value is None or isinstance(value, bool | int | float | str)


def _memory(tensor: Tensor) -> Tensor:
    """The stretch of memory that a tensor spans, gaps included."""
    span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((span if tensor.numel() else 0,), (1,)).clone()
