"""Dependency signatures: which kinds of input reach a value."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from math import prod
from typing import Any, Literal, get_args

import networkx as nx

from dq_plugins.errors import TraceError
from dq_plugins.graph.arguments import root, within

Signature = Literal["temporal", "condition", "mixed", "sample", "constant"]
"""What a value depends on:

- ``temporal``: the timestep alone: one value per timestep of the schedule;
- ``condition``: conditions alone: one value per sampling run;
- ``mixed``: the timestep and conditions, not the sample: one value per timestep and run;
- ``sample``: the noisy sample (and anything else);
- ``constant``: no argument at all: one value, for example a projected position table.
"""

SIGNATURES: tuple[Signature, ...] = get_args(Signature)


SECOND_TIME = re.compile(r"r|dt|delta_t|(\w+_)?(timestep|sigma)(_[a-z])?")
"""Names of further arguments that change from step to step as the timestep does: of the step's other end (flow maps,
mean flow), of a second modality, of clean frames. What depends on them alone is no condition, which stays the same."""


def classify(depends: Iterable[str], timestep: str, sample: str) -> Signature:
    """Signature of a value that the arguments ``depends`` reach.

    Args:
        depends: names of input tensors; the parts of a nested argument count as the argument.
        timestep: name of the timestep argument.
        sample: name of the argument through which the noisy sample enters.

    Example:
        >>> classify({"timestep", "added_cond_kwargs.time_ids"}, "timestep", "sample")
        'mixed'
    """
    names = set(depends)
    if any(within(name, sample) for name in names):
        return "sample"
    of_time = {name for name in names if within(name, timestep)}
    if of_time:
        return "temporal" if of_time == names else "mixed"
    if any(SECOND_TIME.fullmatch(root(name)) for name in names):
        return "mixed"
    return "condition" if names else "constant"


def node_signatures(graph: nx.DiGraph, timestep: str, sample: str) -> dict[str, Signature]:
    """Signature of every node of a dependency graph."""
    return {n: classify(data["depends"], timestep, sample) for n, data in graph.nodes(data=True)}


def find_sample_argument(graph: nx.DiGraph, timestep: str, sample: str | None = None) -> str:
    """The argument through which the noisy sample enters.

    It is the first tensor argument, the timestep left out, that reaches the output and has the output's shape; where
    none has, the first whose shape differs from the output's in one dimension only (denoisers that predict a variance
    as well, or that take a condition concatenated to the sample, differ in the number of channels). Networks that give
    something else than a denoised sample, such as a ControlNet's residuals, come last: the argument with a usual name
    of those that reach the output, or the largest of them.

    Args:
        graph: dependency graph of the denoiser.
        timestep: name of the timestep argument.
        sample: its name, where the search would be wrong; checked.

    Returns:
        The argument's name; for a sample given as a list of tensors, the name of the list.

    Raises:
        TraceError: the search finds none, or the given one does not reach the output.
    """

    def argument(name: str) -> str:  # of an argument that holds the timestep too, the part
        return name if root(name) == root(timestep) else root(name)

    inputs = {n: d for n, d in graph.nodes(data=True) if d["op"] == "input" and not within(d["depends"][0], timestep)}
    reaching = {argument(name) for name in graph.nodes["output"]["depends"]}
    arguments = list(dict.fromkeys(argument(d["depends"][0]) for d in inputs.values()))
    if sample is not None:
        if sample not in arguments or sample not in reaching:
            raise TraceError(
                f"{sample!r} was given as the noisy sample, but no tensor of that name reaches the denoiser's output. "
                f"Tensors that do: {', '.join(sorted(reaching - {timestep})) or 'none'}."
            )
        return sample
    output = _output_shape(graph)
    for differing in (0, 1):
        for data in inputs.values():
            name = argument(data["depends"][0])
            if name in reaching and _differing(data["shape"], output) == differing:
                return name
    if (other := _usual_or_largest(inputs.values(), argument, reaching)) is not None:
        return other
    shapes = ", ".join(f"{argument(d['depends'][0])} {tuple(d['shape'])}" for d in inputs.values()) or "none"
    raise TraceError(
        f"no argument can be the noisy sample: none of floating point reaches the output. Tensor arguments: {shapes}."
    )


SAMPLE_NAMES = ("sample", "hidden_states", "x", "x_t", "latents", "latent", "noisy", "input", "inputs")
"""Names that denoisers use for the noisy sample."""


def _usual_or_largest(
    inputs: Iterable[Mapping[str, Any]], argument: Callable[[str], str], reaching: Container[str]
) -> str | None:
    sizes: dict[str, int] = {}
    for data in inputs:
        name = argument(data["depends"][0])
        if name in reaching and str(data.get("dtype", "float")).startswith(("float", "bfloat")):
            sizes[name] = sizes.get(name, 0) + prod(data["shape"])
    usual = (name for name in SAMPLE_NAMES if name in sizes)
    return next(usual, None) or max(sizes, key=sizes.__getitem__, default=None)


def _output_shape(graph: nx.DiGraph) -> list[int]:
    for source, _, data in graph.in_edges("output", data=True):
        if 0 in data["positions"]:
            return graph.nodes[source]["shape"]
    return []


def _differing(shape: list[int], other: list[int]) -> int:
    if len(shape) != len(other) or not shape:
        return max(len(shape), len(other), 2)
    return sum(a != b for a, b in zip(shape, other, strict=True))


def enclosing(module: str) -> Iterator[str]:
    """Names of a module and of those around it, innermost first; the last is the denoiser's own, ``""``."""
    while module:
        yield module
        module = module.rpartition(".")[0]
    yield ""
