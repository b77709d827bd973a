"""Dataclasses <-> JSON and named tensors: the one way that a plan's parts go to disk.

A dataclass becomes a JSON object of its fields; a tensor becomes its own name, ``layers/<fqn>.weight.scale``, and lies
beside the JSON under that name. Reading is strict: pydantic checks every field against its annotation, an unknown field
is an error, and so is what a ``__post_init__`` refuses with a `PlanError`; the message names the place. A field that is
added to a dataclass, annotated and given the default None, needs nothing here: it is left out while it is None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, PlainValidator, TypeAdapter, ValidationError, ValidationInfo, WithJsonSchema
from torch import Tensor

from dq_plugins.errors import PlanError

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
"""``__pydantic_config__`` of every dataclass that goes to disk."""


def _look_up(name: Any, info: ValidationInfo) -> Tensor:
    tensors: Mapping[str, Tensor] = info.context
    if not isinstance(name, str) or name not in tensors:
        raise ValueError(f"there is no tensor {name!r} beside the plan")
    return tensors[name]


StoredTensor = Annotated[
    Tensor, PlainValidator(_look_up), WithJsonSchema({"type": "string", "description": "name of a stored tensor"})
]
"""Annotation of a tensor field."""


def encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON data of a value; its tensors are put into ``tensors``, by where they are.

    Args:
        value: a dataclass, mapping, sequence, set of strings, tensor, or a JSON scalar.
        path: where it is.
        tensors: filled.
    """
    if isinstance(value, Tensor):
        # clone: views of one storage cannot be written side by side, and a slice would drag its whole storage along
        tensors[path] = value.detach().cpu().clone().contiguous()
        return path
    if is_dataclass(value):
        prefix = f"{path}." if path else ""
        parts = [(f, getattr(value, f.name)) for f in fields(value)]
        return {
            f.name: encode(each, f"{prefix}{f.name}", tensors) for f, each in parts if not _implied(each, f.default)
        }
    if isinstance(value, Mapping):
        return {str(key): encode(each, f"{path}/{key}", tensors) for key, each in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [encode(each, f"{path}/{i}", tensors) for i, each in enumerate(value)]
    return value


def _implied(value: Any, default: Any) -> bool:
    """Whether a field is left out: None, or an infinity (which JSON does not have), where that is the default."""
    return (value is None and default is None) or (isinstance(value, float) and math.isinf(value) and value == default)


def decode(adapter: TypeAdapter[Any], raw: Any, tensors: Mapping[str, Tensor], where: str) -> Any:
    """The value that `encode` took apart.

    Args:
        adapter: of its type.
        raw: the JSON data.
        tensors: by name.
        where: start of the message, such as "plan/ is not a valid plan".

    Raises:
        PlanError: a field is missing, unknown, of the wrong type, or refused; the message names the place.
    """
    try:
        return adapter.validate_json(json.dumps(raw, allow_nan=False), strict=True, context=tensors)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise PlanError(f"{where}: at {place}: {first['msg'].removeprefix('Value error, ')}") from error
    except (TypeError, ValueError) as error:
        raise PlanError(f"{where}: it has a part that JSON cannot hold: {error}") from error
