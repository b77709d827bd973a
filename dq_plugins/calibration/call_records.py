"""Nested arguments and outputs of a denoiser as JSON data plus tensors, and back.

A tensor is ``{"tensor": HASH}``, a tuple ``{"tuple": [...]}``, a dictionary ``{"dict": {...}}``, an output class its
fields likewise with ``"class": "module:qualified name"``; lists, numbers, strings and None are themselves.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dq_plugins.errors import CalibrationError
from dq_plugins.hashing import hash_tensor


def encode(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """Describe ``value``; a copy on the CPU of each tensor in it is added to ``tensors``, by content hash.

    Args:
        name: dotted path of the value, for error messages.
        value: tensors, numbers, strings, None, and lists, tuples, dictionaries and output classes of these.
        tensors: receives the copies.

    Raises:
        CalibrationError: a tensor or number is not finite, or the value has another type.
    """
    if isinstance(value, Tensor):
        _check_finite(name, value)
        copy = value.detach().to("cpu", copy=True).contiguous()
        key = hash_tensor(copy)
        tensors[key] = copy
        return {"tensor": key}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        if isinstance(value, float) and not math.isfinite(value):
            raise CalibrationError(f"{name} is {value}; only finite values can be recorded")
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        owner = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"dict": _encode_items(name, fields, tensors), "class": owner}
    if isinstance(value, Mapping):
        return {"dict": _encode_items(name, value, tensors)}
    if isinstance(value, list | tuple):
        items = [encode(f"{name}.{i}", item, tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise CalibrationError(
        f"{name} is a {type(value).__name__}, which cannot be recorded. Denoiser arguments and outputs are tensors, "
        "numbers, strings, None, and lists, tuples, dictionaries and dataclasses of these."
    )


def _encode_items(name: str, items: Mapping[Any, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    for key in items:
        if not isinstance(key, str):
            raise CalibrationError(f"{name} has the key {key!r}; only dictionaries with string keys can be recorded")
    return {key: encode(f"{name}.{key}", item, tensors) for key, item in items.items()}


def _check_finite(name: str, tensor: Tensor) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise CalibrationError(
            f"{name} holds {bad} values that are NaN or infinite, out of {tensor.numel()} (shape "
            f"{tuple(tensor.shape)}); quantization ranges can only be learned from finite values. Check that the "
            "full-precision model samples correctly, for example in float32 instead of float16."
        )


def decode(node: Any, fetch: Callable[[str], Tensor]) -> Any:
    """The value that `encode` described.

    Args:
        node: the description.
        fetch: gives the tensor of a content hash.

    Raises:
        CalibrationError: the output class is not loaded in this process.
    """
    if isinstance(node, list):
        return [decode(item, fetch) for item in node]
    if not isinstance(node, dict):
        return node
    if "tensor" in node:
        return fetch(node["tensor"])
    if "tuple" in node:
        return tuple(decode(item, fetch) for item in node["tuple"])
    fields = {key: decode(item, fetch) for key, item in node["dict"].items()}
    return _output_class(node["class"])(**fields) if "class" in node else fields


def _output_class(name: str) -> type:
    # Looked up among loaded modules only: a manifest must never be able to import code.
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if isinstance(found, type) and dataclasses.is_dataclass(found):
        return found
    raise CalibrationError(
        f"a recorded output has the class {name!r}, which is not loaded in this process. Load the denoiser before "
        "replaying its calls, or record it with return_dict=False."
    )


def tensor_keys(node: Any) -> Iterator[str]:
    """Content hashes of the tensors of a description, in order."""
    return (leaf["tensor"] for _, leaf in leaf_nodes("", node) if is_tensor(leaf))


def is_tensor(leaf: Any) -> bool:
    """Whether a leaf of a description stands for a tensor."""
    return isinstance(leaf, dict)


def leaf_nodes(name: str, node: Any) -> Iterator[tuple[str, Any]]:
    """Dotted paths and leaves (tensors and plain values) of a description, in order."""
    children = node.get("dict", node.get("tuple")) if isinstance(node, dict) else node
    if not isinstance(children, dict | list):
        yield name, node
        return
    for key, item in children.items() if isinstance(children, dict) else enumerate(children):
        yield from leaf_nodes(f"{name}.{key}", item)
