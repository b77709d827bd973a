"""Nested arguments and outputs of a denoiser as JSON data plus tensors, and back.

A tensor is ``{"tensor": HASH}``, a tuple ``{"tuple": [...]}``, a dictionary ``{"dict": {...}}``, one with whole numbers
among its keys ``{"pairs": [[KEY, ...], ...]}``, an output class its fields likewise with
``"class": "module:qualified name"``; lists, numbers, strings and None are themselves.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
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
        items = _encode_items(name, value, tensors)
        return (
            {"dict": items} if all(isinstance(key, str) for key in items) else {"pairs": [[*p] for p in items.items()]}
        )
    if isinstance(value, list | tuple):
        items = [encode(f"{name}.{i}", item, tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise CalibrationError(
        f"{name} is a {type(value).__name__}, which cannot be recorded. Denoiser arguments and outputs are tensors, "
        "numbers, strings, None, and lists, tuples, dictionaries and dataclasses of these."
    )


def _encode_items(name: str, items: Mapping[Any, Any], tensors: dict[str, Tensor]) -> dict[Any, Any]:
    for key in items:
        if not _is_key(key):
            raise CalibrationError(
                f"{name} has the key {key!r}; only dictionaries whose keys are strings or whole numbers can be recorded"
            )
    return {key: encode(f"{name}.{key}", item, tensors) for key, item in items.items()}


def _is_key(key: Any) -> bool:
    return isinstance(key, str) or (isinstance(key, int) and not isinstance(key, bool))


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


def check_description(node: Any) -> Any:
    """The description itself, if `encode` may have made it; a validator of records that are read.

    Raises:
        ValueError: it has another form.
    """
    if isinstance(node, dict):
        _check_form(node)
    children = _children(node)
    for item in children.values() if isinstance(children, dict) else children or ():
        check_description(item)
    return node


def _check_form(node: dict[str, Any]) -> None:
    kinds = {("tensor",): str, ("tuple",): list, ("dict",): dict, ("class", "dict"): dict, ("pairs",): list}
    kind = kinds.get(tuple(sorted(node)))
    content = next((node[key] for key in ("tensor", "tuple", "dict", "pairs") if key in node), None)
    if kind is None or not isinstance(content, kind) or not isinstance(node.get("class", ""), str):
        raise ValueError(
            f"a value is described by 'tensor', 'tuple', 'dict' or 'pairs', got the keys {sorted(node)[:4]}"
        )
    if "pairs" in node and not all(isinstance(p, list) and len(p) == 2 and _is_key(p[0]) for p in node["pairs"]):
        raise ValueError("a dictionary is described by pairs of a key, a string or whole number, and a value")


def _children(node: Any) -> dict[Any, Any] | list[Any] | None:
    """What a description holds: entries of a dictionary or output class by key, or of a list or tuple; None: a leaf."""
    if not isinstance(node, dict):
        return node if isinstance(node, list) else None
    return dict(node["pairs"]) if "pairs" in node else node.get("dict", node.get("tuple"))


def decode(node: Any, fetch: Callable[[str], Tensor]) -> Any:
    """The value that `encode` described.

    Args:
        node: the description, as `check_description` wants it.
        fetch: gives the tensor of a content hash.

    Raises:
        CalibrationError: the output class is not loaded in this process, or does not have these fields.
    """
    children = _children(node)
    if isinstance(children, list):
        items = [decode(item, fetch) for item in children]
        return items if isinstance(node, list) else tuple(items)
    if isinstance(children, dict):
        fields = {key: decode(item, fetch) for key, item in children.items()}
        return _output(node["class"], fields) if "class" in node else fields
    return fetch(node["tensor"]) if is_tensor(node) else node


def _output(name: str, fields: dict[str, Any]) -> Any:
    """A dataclass from its fields.

    A manifest must never be able to run code: the class is looked up among modules that are loaded, without asking a
    module for what it would import then, and nothing of the class runs but what `dataclass` itself wrote. The classes
    of diffusers and transformers are dictionaries, which fill themselves in a ``__post_init__`` of their library.
    """
    found = _output_class(name)
    own = "__post_init__" if hasattr(found, "__post_init__") else ""
    own = own or ("" if found.__dataclass_params__.init else "__init__")  # type: ignore[attr-defined]
    if own and not issubclass(found, OrderedDict):
        raise CalibrationError(
            f"a recorded value has the class {name!r}, which has a {own} of its own: it is not run. Record the "
            "denoiser with return_dict=False."
        )
    try:
        return found(**fields)
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"a recorded value does not fit its class {name!r}: {error}") from error


def _output_class(name: str) -> type:
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = vars(found).get(part) if isinstance(found, ModuleType | type) else None
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
    children = _children(node)
    if children is None:
        yield name, node
        return
    for key, item in children.items() if isinstance(children, dict) else enumerate(children):
        yield from leaf_nodes(f"{name}.{key}", item)
