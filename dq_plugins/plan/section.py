"""What a pass adds to a plan beyond the plan's own fields, under the pass's name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from dq_plugins.artifact.codec import STRICT, StoredTensor, decode, encode
from dq_plugins.errors import PlanError
from dq_plugins.plan.brief import brief

Content = TypeVar("Content")


@dataclass
class Section:
    """What a pass adds beyond the fields of a plan, under its own name.

    Findings (curves, scores) are for people, for the pass's own figure and for later analysis. What another pass, the
    runner or an adapter of this project reads is a field of `dq_plugins.plan.QuantPlan` instead. A pass of another
    package keeps its decisions here, as a dataclass of its own (`of`, `read`).

    Attributes:
        data: JSON-serialisable values.
        tensors: named tensors.
        critical: an adapter that does not know this section must refuse the plan, because ignoring it would
            change the result. Findings are not critical.
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    data: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    critical: bool = False

    @classmethod
    def of(cls, content: Any, *, critical: bool = False) -> Section:
        """The section that holds a dataclass; tensors among its fields are annotated `StoredTensor`."""
        tensors: dict[str, Tensor] = {}
        return cls(encode(content, "", tensors), tensors, critical)

    def read(self, kind: type[Content], name: str = "") -> Content:
        """What `of` was given.

        Args:
            kind: the dataclass.
            name: of the section, for the message.

        Raises:
            PlanError: the section does not hold one; the message names the place.
        """
        try:
            content: Content = decode(kind, self.data, self.tensors)
        except ValueError as error:
            raise PlanError(f"section {name!r} of the plan: {error}") from error
        return content
