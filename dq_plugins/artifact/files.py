"""Files that are read with care: where they are, how large they are, what their headers claim."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dq_plugins.artifact.codec import CODES

MEBIBYTE = 1 << 20


def check_place(path: Path) -> None:
    """Raise `ValueError` unless a path is a regular file, and no link that leads out of its folder."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, or is not a file")
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise ValueError(f"{path} is a link that leads out of its folder, which is not followed: copy the file")


def read_bounded(path: Path, most_mb: int) -> bytes:
    """Content of a file.

    Raises:
        ValueError: it is missing, larger than that, or cannot be read.
    """
    check_place(path)
    check_length(path.stat().st_size, path, most_mb)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def check_length(found: int, path: Path, most_mb: int) -> None:
    """Raise `ValueError` for a record of too many bytes."""
    if found > most_mb * MEBIBYTE:
        raise ValueError(f"the record of {path} takes {found} bytes; at most {most_mb} MiB are read")


Mapped = bool | Literal["codes"]
"""Whether tensors lie in the file and are read when they are used; ``"codes"``: those of int8 and int16 do."""


def read_tensors(path: Path, *, mapped: Mapped = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file.

    Args:
        path: of the file.
        mapped: see `Mapped`. Copy what is computed with in floating point: on the mapped file's alignment some kernels
            round differently.

    Raises:
        ValueError: it is missing, or no safetensors; what its header claims does not fit its size.
    """
    check_place(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}. It is truncated or damaged") from error
    stays = {True: lambda _: True, False: lambda _: False, "codes": lambda tensor: tensor.dtype in CODES}[mapped]
    return metadata, {name: tensor if stays(tensor) else tensor.clone() for name, tensor in tensors.items()}
