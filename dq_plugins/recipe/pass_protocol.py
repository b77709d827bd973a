"""The pass protocol: one step that reads the denoiser and the calibration set and writes the plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dq_plugins.errors import RecipeError, close_matches
from dq_plugins.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dq_plugins.plan import QuantPlan
    from dq_plugins.recipe.pass_context import PassContext


class PassOptions(BaseModel):
    """Base of a pass's options: unknown names and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Pass(ABC):
    """Base class of passes.

    A subclass sets ``name``, declares ``Options``, and implements `run`. It never changes the denoiser's weights
    (it may wrap or hook it while it runs), draws random numbers from ``context.generator()`` only, and says
    everything it decides in the plan.

    Attributes:
        name: the name it is registered under.
        requires: passes that must have run before.
        after: passes that, if present, must come before.

    Example:
        >>> class Nothing(Pass):
        ...     name = "nothing"
        ...     def run(self, plan, context):
        ...         yield Progress(1, 1)
        >>> Nothing().options
        PassOptions()
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    Options: ClassVar[type[PassOptions]] = PassOptions

    def __init__(self, **options: Any) -> None:
        try:
            self.options = self.Options(**options)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            fields = self.Options.model_fields
            known = f"its options are: {', '.join(fields) or 'none'}"
            if first["type"] == "extra_forbidden":
                fault = f"there is no option {field!r}{close_matches(field, fields) or ';'} {known}"
            else:
                fault = f"option {field!r}: {first['msg']} (got {first['input']!r}); {known}"
            raise RecipeError(f"pass {self.name!r}: {fault}") from error

    @property
    def statistics_samples(self) -> int | None:
        """Samples that statistics of inputs are to be of at least; None: this pass does not care."""
        return None

    @classmethod
    def figure(cls, plan: QuantPlan) -> tuple[Figure, str] | None:
        """What a report shows of this pass's decisions: a figure drawn from the plan alone, and its caption."""
        return None

    @abstractmethod
    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress] | None:
        """Write this pass's decisions into ``plan``; a generator yields its progress."""
