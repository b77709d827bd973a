"""Our configs as data: torchao's ``config_to_dict`` and ``config_from_dict`` know them once this module is imported."""

from __future__ import annotations

from typing import Any, TypeVar

from torchao.core import config as torchao_config

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
        return kind(**{**data["_data"], "version": data["_version"]})
    except (KeyError, TypeError) as error:
        raise DQError(f"the quantization config is damaged: {type(error).__name__}: {error}") from error
