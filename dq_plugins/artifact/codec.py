"""Dataclasses <-> JSON and named tensors: the one way that values go to disk.

A dataclass becomes a JSON object of its fields; a tensor becomes its own name, ``layers/<fqn>.weight.scale``, and lies
beside the JSON under that name. Reading is strict: pydantic checks every field against its annotation, an unknown field
is an error, and so is what a ``__post_init__`` refuses with a `ValueError`; the message names the place. A field that
is added to a dataclass, annotated and given the default None, needs nothing here: it is left out while it is None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, PlainValidator, TypeAdapter, ValidationError, ValidationInfo, WithJsonSchema
from torch import Tensor

from dq_plugins.errors import DQError

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
"""``__pydantic_config__`` of every dataclass that goes to disk."""
CODES, MANY = (torch.int8, torch.int16), 1 << 16
"""Tensors of these types and of so many numbers are not copied by `encode`."""


def _look_up(name: Any, info: ValidationInfo) -> Tensor:
    tensors: Mapping[str, Tensor] = info.context
    if not isinstance(name, str) or name not in tensors:
        raise ValueError(f"there is no tensor {name!r} beside the record")
    return tensors[name]


StoredTensor = Annotated[
    Tensor, PlainValidator(_look_up), WithJsonSchema({"type": "string", "description": "name of a stored tensor"})
]
"""Annotation of a tensor field."""


def encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON data of a value; its tensors are put into ``tensors``, by where they are.

    Args:
        value: a dataclass, pydantic model, mapping, sequence, set of strings, tensor, or a JSON scalar.
        path: where it is.
        tensors: filled.
    """
    if isinstance(value, Tensor):
        tensors[path] = _apart(value.detach().cpu().contiguous(), tensors)
        return path
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value):
        parts = [(f, getattr(value, f.name)) for f in fields(value)]
        return {
            f.name: encode(each, _join(path, ".", f.name), tensors)
            for f, each in parts
            if not _implied(each, f.default)
        }
    if isinstance(value, Mapping):
        return {str(key): encode(each, _join(path, "/", str(key)), tensors) for key, each in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [encode(each, _join(path, "/", str(i)), tensors) for i, each in enumerate(value)]
    return value


def _apart(plain: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    """A tensor that can be written beside others: no view of a storage of theirs, nor of a longer one.

    Many codes of a weight are not copied, nobody changes them in place: those of a large denoiser take gigabytes.
    """
    if plain.dtype not in CODES or plain.numel() < MANY:
        return plain.clone()
    twice = any(each.dtype in CODES and each.data_ptr() == plain.data_ptr() for each in others.values())
    return plain.clone() if twice else plain


def _join(path: str, separator: str, part: str) -> str:
    return f"{path}{separator}{part}" if path else part


def _implied(value: Any, default: Any) -> bool:
    """Whether a field is left out: None, or an infinity (which JSON does not have), where that is the default."""
    return (value is None and default is None) or (isinstance(value, float) and math.isinf(value) and value == default)


def decode(schema: Any, raw: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `encode` took apart.

    Args:
        schema: its type, or anything else that pydantic validates.
        raw: the JSON data.
        tensors: by name.

    Raises:
        ValueError: a field is missing, unknown, of the wrong type, or refused; the message names the place.
    """
    try:
        return adapter(schema).validate_json(json.dumps(raw, allow_nan=False), strict=True, context=tensors)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise ValueError(f"at {place}: {first['msg'].removeprefix('Value error, ')}") from error
    except (DQError, RuntimeError, LookupError, ArithmeticError) as error:
        # what a `__post_init__` computes with a tensor of a dtype or shape that has no such operation
        raise ValueError(f"a part of it cannot be right: {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"it has a part that JSON cannot hold: {error}") from error


@cache
def adapter(schema: Any) -> TypeAdapter[Any]:
    """pydantic's view of a type."""
    return TypeAdapter(schema)
