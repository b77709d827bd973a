"""Check a partition against the running denoiser: change one kind of input, see which layers' outputs change.

Two tests with different strength. A layer that the graph says an input does not reach must give the same bits when
that input changes; a difference means that the graph is wrong. A layer that the graph says the input reaches may
still give the same bits (weights initialised to zero, saturated activations), so that is reported, not an error.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.errors import TraceError
from dq_plugins.graph.arguments import map_leaves, named_leaves, root, unwrap
from dq_plugins.graph.partition import LayerInfo, Partition

Digests = dict[str, list[bytes]]


@dataclass(frozen=True)
class ProbeReport:
    """What the probes of one denoiser saw; that there is a report means that none contradicts the partition.

    Attributes:
        confirmed: per kind of input that was changed (``"sample"``, ``"condition"``, ``"timestep"``), the layers that
            the graph says it does not reach and whose outputs stayed the same, bit for bit.
        unchanged: per kind of input, the layers that the graph says it reaches and whose outputs stayed the same all
            the same, as zero-initialised layers do.
        unobserved: layers that are never called as modules (another module uses their weight), so no probe sees them.
    """

    confirmed: Mapping[str, tuple[str, ...]]
    unchanged: Mapping[str, tuple[str, ...]]
    unobserved: tuple[str, ...]


def check_by_probing(
    denoiser: nn.Module, example_inputs: Mapping[str, Any], partition: Partition, seed: int = 0
) -> ProbeReport:
    """Run the denoiser with another sample, other conditions and another timestep, and compare every layer's output.

    Args:
        denoiser: with real weights; it is run four times, in evaluation mode, and left as it was.
        example_inputs: real tensors on the denoiser's device.
        partition: of this denoiser.
        seed: of the random changes.

    Returns:
        What was confirmed, and which layers did not react though they may.

    Raises:
        TraceError: a layer reacts to an input that the graph says does not reach it, or there is nothing real to run.
    """
    denoiser = unwrap(denoiser)
    _require_values(denoiser, example_inputs)
    generator = torch.Generator().manual_seed(seed)
    reference = _observe(denoiser, example_inputs, partition)
    confirmed: dict[str, tuple[str, ...]] = {}
    unchanged: dict[str, tuple[str, ...]] = {}
    wrong: list[str] = []
    for kind, names in _kinds(example_inputs, partition).items():
        changed, inputs = _change(example_inputs, names, generator)
        if not changed:
            continue
        observed = _observe(denoiser, inputs, partition)
        same = {name for name in reference if observed[name] == reference[name]}
        reached = {name for name in reference if partition.layers[name].depends & changed}
        confirmed[kind] = tuple(n for n in reference if n in same and n not in reached)
        unchanged[kind] = tuple(n for n in reference if n in same and n in reached)
        wrong += [_disagreement(partition.layers[n], kind) for n in reference if n not in same and n not in reached]
    if wrong:
        raise TraceError(
            f"running {type(denoiser).__name__} contradicts its dependency graph: {'; '.join(wrong[:8])}"
            f"{f'; and {len(wrong) - 8} more' if len(wrong) > 8 else ''}. Its forward does at run time what tracing "
            "could not see: state kept between calls, randomness, hooks, or code that a compiler is told to skip. "
            "Remove that, or trace the denoiser as it is run."
        )
    return ProbeReport(confirmed, unchanged, tuple(n for n in partition.layers if n not in reference))


def _disagreement(layer: LayerInfo, kind: str) -> str:
    return f"{layer.name!r} ({layer.signature} in the graph) changes with the {kind}"


def _require_values(denoiser: nn.Module, inputs: Mapping[str, Any]) -> None:
    tensors = [*denoiser.parameters(), *(value for _, value in named_leaves(inputs) if isinstance(value, Tensor))]
    if any(tensor.is_meta for tensor in tensors):
        raise TraceError(
            f"probing runs {type(denoiser).__name__}, and some of its weights or inputs are on the meta device, "
            "which holds no values. Load the weights and give real example inputs, or rely on the graph alone."
        )


def _kinds(inputs: Mapping[str, Any], partition: Partition) -> dict[str, set[str]]:
    """Names of the leaves of each kind of input."""
    kinds: dict[str, set[str]] = {"sample": set(), "condition": set(), "timestep": set()}
    special = {partition.sample_argument: "sample", partition.timestep: "timestep"}
    for name, _ in named_leaves(inputs):
        kinds[special.get(root(name), "condition")].add(name)
    return kinds


def _change(
    inputs: Mapping[str, Any], names: set[str], generator: torch.Generator
) -> tuple[frozenset[str], dict[str, Any]]:
    """Inputs with other values under ``names``, and the names where that is possible."""
    changed: set[str] = set()

    def other(name: str, value: Any) -> Any:
        new = _other_value(value, generator) if name in names else None
        if new is None:
            return value
        changed.add(name)
        return new

    result = map_leaves(inputs, other)
    return frozenset(changed), result


def _other_value(value: Any, generator: torch.Generator) -> Any:
    """Another value of the same kind, valid wherever the first one is; None where there is none to be had."""
    if isinstance(value, bool) or not isinstance(value, Tensor | int | float):
        return None  # flags and masks choose what runs
    if not isinstance(value, Tensor):
        return type(value)(value // 2 if value > 1 else value + 1) if isinstance(value, int) else value * 0.5 + 0.125
    if value.dtype == torch.bool or not value.numel():
        return None
    if value.is_floating_point():
        noise = torch.rand(value.shape, generator=generator).to(value)
        return value * 0.5 + (0.125 + noise)
    return torch.where(value > 0, value - 1, value + 1)  # an index below one that is valid, or the second one


def _observe(denoiser: nn.Module, inputs: Mapping[str, Any], partition: Partition) -> Digests:
    """Digest of every output of every layer during one call."""
    digests: Digests = defaultdict(list)

    def record(name: str) -> Callable[..., None]:
        return lambda module, args, output: digests[name].append(_digest(output))

    handles = [denoiser.get_submodule(name).register_forward_hook(record(name)) for name in partition.layers]
    try:
        with torch.no_grad(), _evaluating(denoiser):
            denoiser(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: digests[name] for name in partition.layers if name in digests}


def _digest(output: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for _, tensor in named_leaves({"output": output}):
        if isinstance(tensor, Tensor):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


@contextmanager
def _evaluating(denoiser: nn.Module) -> Iterator[None]:
    training = [module for module in denoiser.modules() if module.training]
    denoiser.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
