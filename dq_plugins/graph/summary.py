"""A partition as plain data: what ``dq-plugins inspect`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dq_plugins.graph.block_boundary import BoundaryTensor
from dq_plugins.graph.partition import LayerInfo, Partition
from dq_plugins.graph.signatures import SIGNATURES


def summarise(partition: Partition) -> dict[str, Any]:
    """Everything that the partition of a denoiser says, JSON-serialisable.

    Returns:
        A dictionary with the keys ``timestep``, ``sample``, ``inputs`` (shape and dtype by dotted name),
        ``parameters`` (elements), ``macs`` (``layers``, ``attention``: products of two activations, ``total``),
        ``signatures`` (per signature: number of layers, their parameters and MACs), ``roles`` (layers by role),
        ``block_boundary`` and ``layers`` (every attribute of each).
    """
    products = sum(data["macs"] for data in partition.graph.nodes.values() if not data["layer"])
    in_layers = sum(layer.macs for layer in partition.layers.values())
    return {
        "timestep": partition.timestep,
        "sample": partition.sample_argument,
        "inputs": {
            data["depends"][0]: {"shape": data["shape"], "dtype": data["dtype"]}
            for data in partition.graph.nodes.values()
            if data["op"] == "input"
        },
        "parameters": partition.total_params,
        "macs": {"layers": in_layers, "attention": products, "total": in_layers + products},
        "signatures": {signature: _totals(partition, signature) for signature in SIGNATURES},
        "roles": _by_role(partition.layers),
        "block_boundary": [_row(tensor) for tensor in partition.block_boundary],
        "layers": {name: _row(layer) for name, layer in partition.layers.items()},
    }


def _totals(partition: Partition, signature: str) -> dict[str, int]:
    layers = [layer for layer in partition.layers.values() if layer.signature == signature]
    return {
        "layers": len(layers),
        "parameters": sum(layer.params for layer in layers),
        "macs": sum(layer.macs for layer in layers),
    }


def _by_role(layers: Mapping[str, LayerInfo]) -> dict[str, list[str]]:
    roles = sorted({role for layer in layers.values() for role in layer.roles})
    return {role: [name for name, layer in layers.items() if role in layer.roles] for role in roles}


def _row(described: LayerInfo | BoundaryTensor) -> dict[str, Any]:
    values = {each.name: getattr(described, each.name) for each in fields(described)}
    return {
        name: sorted(value) if isinstance(value, frozenset) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }
