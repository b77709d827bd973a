"""What every conformance suite shares: which plugin is meant, and how an expectation is stated.

The suites are plain classes with ``test_`` methods. pytest collects a subclass whose name starts with ``Test``, and
`dq_plugins.testing.running` runs the same class where pytest is not installed.
"""

from __future__ import annotations

import re
import unittest
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from dq_plugins import registry
from dq_plugins.errors import DQError


class ConformanceError(AssertionError):
    """A plugin does not keep the protocol of its kind."""


def expect(condition: object, message: str) -> None:
    """Raise `ConformanceError` with ``message`` unless ``condition`` is true (``assert`` is absent under -O)."""
    if not condition:
        raise ConformanceError(message)


@contextmanager
def refused(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Expect the body of the ``with`` block to raise one of ``errors``.

    Args:
        what: the thing that ought to be refused, as the start of "... was accepted".
        errors: what may be raised; `DQError` by default.

    Raises:
        ConformanceError: nothing, or something else, was raised.
    """
    allowed = errors or (DQError,)
    names = " or ".join(error.__name__ for error in allowed)
    try:
        yield
    except unittest.SkipTest:
        raise
    except allowed:
        return
    except Exception as error:
        raise ConformanceError(f"{what} raised {type(error).__name__} ({error}); expected {names}") from error
    raise ConformanceError(f"{what} was accepted; expected {names}")


class Conformance:
    """Base of the suites; a subclass names the plugin.

    Attributes:
        kind: the kind of plugin the suite is for.
        name: the registered name of the plugin under test.
        options: options it is made or called with, beside its defaults.

    Example:
        >>> from dq_plugins.testing import ObserverConformance
        >>> class TestMyObserver(ObserverConformance):
        ...     name = "my-observer"
    """

    kind: ClassVar[registry.Kind]
    name: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}

    @property
    def plugin(self) -> Any:
        """The plugin under test, from the registry."""
        if not hasattr(self, "name"):
            raise ConformanceError(f"{type(self).__name__} sets no name; write: name = 'the-registered-name'")
        return registry.get(self.kind, self.name)

    def test_it_is_registered_and_loads(self) -> None:
        expect(self.plugin is not None, f"the {self.kind} {self.name!r} is None")
        states = [registry.status(plugin)[0] for plugin in registry.plugins(self.kind) if plugin.name == self.name]
        expect("ok" in states, f"the {self.kind} {self.name!r} is listed as {states} after it was loaded")

    def test_name_can_be_typed_on_a_command_line(self) -> None:
        """Lower-case words joined by hyphens or dots: no quoting, and no clash with the grammar of DQ_PLUGINS."""
        expect(
            re.fullmatch(r"[a-z0-9]+([-.][a-z0-9]+)*", self.name),
            f"the name {self.name!r} is not of lower-case words and digits joined by hyphens",
        )

    def test_it_says_what_it_is(self) -> None:
        plugin = self.plugin
        text = plugin.summary if hasattr(plugin, "summary") else plugin.__doc__
        expect(text and text.strip(), f"the {self.kind} {self.name!r} has no docstring that says what it does")
