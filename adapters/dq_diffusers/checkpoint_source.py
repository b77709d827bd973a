"""Which files the running ``from_pretrained`` is about to read, before it reads them.

diffusers reads a single weight file, a pickle if there is no safetensors file, before its quantizer sees the list of
files; and where the file is damaged it says no more than "unable to load". A quantizer is asked earlier, for its
environment, but is not told what is loaded. That is read from the frame of ``from_pretrained``, from its public
arguments, as `dq_torchao.running_quantize` does with ``quantize_``: nothing is kept, and nothing is changed.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path, PurePath
from typing import Any

from diffusers import ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME

from dq_plugins.errors import CheckpointError

_LOADER = inspect.unwrap(ModelMixin.from_pretrained.__func__).__code__  # type: ignore[attr-defined]


def checkpoint_files() -> list[Path] | None:
    """The safetensors files of the running ``from_pretrained``; None where they are not known before it reads them.

    Raises:
        CheckpointError: it would read pickles, or might: the folder has no safetensors file, or the model is on the hub
            and ``use_safetensors=True`` was not passed.
    """
    arguments = _arguments()
    if arguments is None:
        return None
    source, variant = Path(str(arguments["pretrained_model_name_or_path"])), arguments.get("variant")
    if not source.is_dir():
        if arguments.get("allow_pickle"):
            raise CheckpointError(
                f"{source} is not a folder here. For a model on the hub diffusers falls back to pickles where it finds "
                "no safetensors, and pickles can run code when they are read. Pass use_safetensors=True."
            )
        return None
    folder = source / (arguments.get("subfolder") or "")
    index = folder / _with_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    if index.is_file():
        return _shards(index)
    file = folder / _with_variant(SAFETENSORS_WEIGHTS_NAME, variant)
    if not file.is_file():
        others = ", ".join(sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")))
        raise CheckpointError(
            f"{folder} has no {file.name}{f', only {others}, which is not opened' if others else ''}. Only safetensors "
            "are read here, because pickles can run code when they are read. Save the model again with save_pretrained."
        )
    return [file]


def _arguments() -> dict[str, Any] | None:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _LOADER:
            return frame.f_locals
        frame = frame.f_back
    return None


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        outside = [name for name in names if PurePath(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not an index of a sharded checkpoint: {type(error).__name__}: {error}"
        ) from error
    if outside or not names:
        raise CheckpointError(
            f"{index} must name files beside it, and names {outside or 'none'}: it is damaged or hostile"
        )
    return [index.parent / name for name in names]


def _with_variant(name: str, variant: str | None) -> str:
    if variant is None:
        return name
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}"
