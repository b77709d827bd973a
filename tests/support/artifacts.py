"""Edits of artifacts, as an attacker or a careless hand makes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from dq_plugins.artifact.format import METADATA_KEY
from dq_plugins.hashing import hash_json


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if path.suffix == ".json":
        return json.loads(path.read_text()), {}
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  not a dict
        return json.loads(file.metadata()[METADATA_KEY]), tensors


def _write(path: Path, data: Any, tensors: dict[str, Any]) -> None:
    text = data if isinstance(data, str) else json.dumps(data)
    if path.suffix == ".json":
        path.write_text(text)
    else:
        save_file(tensors, path, {METADATA_KEY: text})


def edit_file(path: Path, **changes: Any) -> None:
    """Change what stands around the record; the hash stays as it was, unless it is changed."""
    data, tensors = _read(path)
    _write(path, data | changes, tensors)


def edit_record(path: Path, change: Callable[[Any], object], *, tensors: dict[str, Any] | None = None) -> None:
    """Change the record in place, or the tensors, and hash the record again, so that the schema has to find it."""
    data, found = _read(path)
    change(data["record"])
    fields = {key: value for key, value in data.items() if key != "hash"}
    _write(path, {**fields, "hash": hash_json(fields)}, found if tensors is None else tensors)


def replace_text(path: Path, text: str) -> None:
    """Put another text in the place of record and all that stands around it."""
    _write(path, text, _read(path)[1])
