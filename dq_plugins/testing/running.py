"""Run a conformance suite without pytest."""

from __future__ import annotations

import time
import traceback
import unittest
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dq_plugins.testing.conformance import Conformance

Outcome = Literal["passed", "failed", "error", "skipped"]


@dataclass(frozen=True)
class Result:
    """What became of one test of a suite.

    Attributes:
        test: name of the method without ``test_``, underscores read as spaces.
        outcome: ``failed``: the plugin does not keep the protocol; ``error``: it raised what nobody expected.
        message: why it did not pass; empty if it did.
        seconds: wall-clock time.
    """

    test: str
    outcome: Outcome
    message: str
    seconds: float


def run_suite(suite: type[Conformance]) -> Iterator[Result]:
    """Run every ``test_`` method of ``suite``, each on an instance of its own, in the order of their names.

    Args:
        suite: a suite whose ``name`` is set.

    Yields:
        One result per method, as soon as it is known.
    """
    for method in sorted(each for each in dir(suite) if each.startswith("test_")):
        start = time.perf_counter()
        outcome, message = _outcome(suite, method)
        yield Result(method.removeprefix("test_").replace("_", " "), outcome, message, time.perf_counter() - start)


def _outcome(suite: type[Conformance], method: str) -> tuple[Outcome, str]:
    try:
        getattr(suite(), method)()
    except unittest.SkipTest as reason:
        return "skipped", str(reason)
    except AssertionError as error:
        return "failed", " ".join(str(error).split())
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())
        return "error", f"{type(error).__name__}: {text} ({frame.filename}:{frame.lineno})"
    return "passed", ""
