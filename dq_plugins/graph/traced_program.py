"""One traced call of a denoiser: a graph of ops, and what its inputs and parameters are called."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import fx, nn

from dq_plugins.quiet import loggers_at

PREFIX = "denoiser"
"""First part of the names of modules in a program."""


def without_prefix(name: str) -> str:
    """The denoiser's own name for what an exported program calls ``name``."""
    name = name.partition("@")[0]  # the second call of a module is "name@1"
    return "" if name == PREFIX else name.removeprefix(f"{PREFIX}.")


class Placeholder(NamedTuple):
    """What a node stands for that no op computes."""

    kind: Literal["parameter", "input", "constant"]
    name: str


@dataclass(frozen=True, eq=False)
class Program:
    """A traced call.

    Attributes:
        graph: the ops, in execution order.
        module: holds what the ``get_attr`` nodes name.
        placeholders: the nodes that stand for inputs, parameters and constant tensors.
        viewed: the node in whose memory the result of a node lies, for views; None where the traced tensors know it.
    """

    graph: fx.Graph
    module: nn.Module
    placeholders: Mapping[fx.Node, Placeholder]
    viewed: Mapping[fx.Node, fx.Node] | None = None


_CHATTY = ("torch.export", "torch._dynamo", "torch.fx", "torch._subclasses.fake_tensor")


@contextlib.contextmanager
def quiet_tracing() -> Iterator[None]:
    """Silence the warnings and log lines of one trace: they are about code that the user did not write.

    A failing export also prints the graph that it has so far, past all loggers.
    """
    with warnings.catch_warnings(), loggers_at(logging.CRITICAL, _CHATTY), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
