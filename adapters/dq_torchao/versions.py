"""Configs that say so when they were written by a newer dq-plugins."""

from __future__ import annotations

from typing import Any, ClassVar

from typing_extensions import Self

from dq_plugins.errors import DQError


class Versioned:
    """Refuses a newer version before its fields are looked at, which this release may not know.

    torchao's ``config_from_dict`` passes the stored version on, and wraps what is raised here into a ``ValueError``
    that ends in the same message.
    """

    newest: ClassVar[int] = 1

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        """Check ``version`` among the fields."""
        version = fields.get("version", cls.newest)
        if not isinstance(version, int) or isinstance(version, bool) or version > cls.newest:
            raise DQError(
                f"this {cls.__name__} has version {version!r}, and this dq-plugins reads versions up to {cls.newest}: "
                "it was written by a newer dq-plugins. Upgrade dq-plugins, or quantize the model again."
            )
        return super().__new__(cls)
