"""What stands around every record: which format it is in, what it depends on, and the hash of it all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from dq_plugins.artifact.codec import STRICT

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Envelope:
    """What stands around every record.

    Attributes:
        format: name of the format.
        format_version: its version.
        library_version: the release that wrote it.
        settings: what the content depends on.
        record: the value without its tensors.
        tensors_hash: of its tensors; None: it has none.
        hash: of everything above.
    """

    __pydantic_config__ = STRICT

    format: str
    format_version: int
    library_version: str
    record: Any
    hash: Digest
    settings: dict[str, Any] | None = None
    tensors_hash: Digest | None = None
