"""Our configs as data: torchao's ``config_to_dict`` and ``config_from_dict`` know them once this module is imported."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any, TypeVar, get_type_hints

from torchao.core import config as torchao_config
from typing_extensions import NotRequired, TypedDict

from dq_plugins.artifact.codec import STRICT, decode
from dq_plugins.errors import DQError

C = TypeVar("C")

torchao_config.ALLOWED_AO_MODULES.add("dq_torchao.serializable")


def config_from_json(data: Any, kind: type[C]) -> C:
    """A config of ours from its JSON form.

    torchao's ``config_from_dict`` reads it too, but looks the class up by the name that the data gives, and wraps
    errors; here the caller says what it must be.

    Args:
        data: what ``config_to_dict`` gave.
        kind: the class it must be.

    Raises:
        DQError: it is damaged, of another class, or of a newer dq-plugins.
    """
    found = data.get("_type") if isinstance(data, dict) else type(data).__name__
    if found != kind.__name__:
        raise DQError(f"the quantization config is a {found}, expected was a {kind.__name__}")
    try:
        version, fields = data["_version"], data["_data"]
        kind.__new__(kind, version=version)  # type: ignore[call-arg]  # a newer one may have unknown fields
        return kind(**decode(_fields_of(kind), fields, {}), version=version)  # type: ignore[call-arg]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DQError):
            raise
        raise DQError(f"the quantization config is damaged: {type(error).__name__}: {error}") from error


@cache
def _fields_of(kind: type) -> Any:
    """The fields of a config as a type of dictionary, so that their types are checked before the class sees them."""
    hints = get_type_hints(kind, include_extras=True)
    known = {f.name: NotRequired[hints[f.name]] for f in fields(kind) if f.name != "version"}  # type: ignore[misc]
    found = TypedDict("Fields", known)  # type: ignore[operator]
    found.__pydantic_config__ = STRICT  # type: ignore[attr-defined]
    return found
