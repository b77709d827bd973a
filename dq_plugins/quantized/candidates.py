"""Every quantizer that bit allocation may choose from: by layer, operand and width.

An attention stands among the layers under a name of its own (`dq_plugins.quantized.attention.site_name`). It has no
weight; its query, key and value are its input, and share a width.

Shapes: ``G`` timestep groups, ``B`` samples in the batch, ``C`` input channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn

from dq_plugins.hashing import hash_json, hash_tensors
from dq_plugins.layer_kinds import kind_of
from dq_plugins.plan import ActivationQuant, AttentionPlan, DynamicActivationQuant, InputQuant, WeightQuant
from dq_plugins.plan.decisions import Operand
from dq_plugins.quantized.input_quantizers import quantize_dynamically, quantize_input
from dq_plugins.quantized.layer_transform import LayerTransform, fake_weight
from dq_plugins.timesteps import RowOrder, TimestepGroups, by_sample_or_token, fewest_entries


class Entry(NamedTuple):
    """One thing to measure: one operand of one layer at one width."""

    layer: str
    operand: Operand
    bits: int

    def __str__(self) -> str:
        """``layer.weight@4``, the key of the entry in a store."""
        return f"{self.layer}.{self.operand}@{self.bits}"


class GroupEntry(NamedTuple):
    """An input of one layer at one width in one timestep group."""

    layer: str
    operand: Operand
    bits: int
    group: int

    def __str__(self) -> str:
        """``layer.activation@4 in group 2``."""
        return f"{self.layer}.{self.operand}@{self.bits} in group {self.group}"


AnyEntry = Entry | GroupEntry


@dataclass(frozen=True, eq=False)
class Candidates:
    """Quantizers of every layer, operand and width: what is measured, and what an allocation is then made of.

    Attributes:
        weights: layer -> bits -> weight quantizer.
        activations: layer -> bits -> quantizer of the layer's input.
        groups: the timestep groups that the activation quantizers name.
        transforms: of the inputs of some layers; their quantizers are those of transformed inputs and weights.
        rows: where the samples of a call are in the inputs of layers.
        attention: name of an attention -> bits -> quantizers of its operands.
    """

    weights: Mapping[str, Mapping[int, WeightQuant]]
    activations: Mapping[str, Mapping[int, InputQuant]]
    groups: Mapping[str, TimestepGroups] = field(default_factory=dict)
    transforms: Mapping[str, LayerTransform] = field(default_factory=dict)
    rows: Mapping[str, RowOrder | None] = field(default_factory=dict)
    attention: Mapping[str, Mapping[int, AttentionPlan]] = field(default_factory=dict)

    def entries(self) -> list[Entry]:
        """All entries: layers in their order, then attentions; weights before activations, widths ascending."""
        tables: tuple[tuple[Operand, Mapping[str, Mapping[int, Any]]], ...] = (
            ("weight", self.weights),
            ("activation", self.inputs),
        )
        return [
            Entry(name, operand, bits)
            for name in (*self.layers, *self.attention)
            for operand, table in tables
            for bits in sorted(table.get(name, {}))
        ]

    @property
    def inputs(self) -> Mapping[str, Mapping[int, InputQuant | AttentionPlan]]:
        """Quantizers of all that has an input to quantize: layers and attentions."""
        return {**self.activations, **self.attention}

    def in_group(self, entry: Entry, timestep: float) -> AnyEntry:
        """The entry for the group of a timestep alone; one whose ranges have no groups, as it is."""
        quant = self.inputs[entry.layer][entry.bits] if entry.operand == "activation" else None
        if not isinstance(quant, ActivationQuant | DynamicActivationQuant) or quant.groups is None:
            return entry
        return GroupEntry(*entry, self.groups[quant.groups].of(timestep))

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Layers with a candidate."""
        return tuple(dict.fromkeys([*self.weights, *self.activations]))

    @cached_property
    def hash(self) -> str:
        """sha256 over every quantizer."""
        tensors: dict[str, Tensor] = {}
        transforms = {layer: transform.hash for layer, transform in self.transforms.items()}
        for entry in self.entries():
            table: Any = self.weights if entry.operand == "weight" else self.inputs
            tensors |= {f"{entry}.{part}": tensor for part, tensor in _tensors(table[entry.layer][entry.bits])}
        groups = {name: list(g.edges) for name, g in self.groups.items()}
        dynamic = {
            f"{layer} {bits}": [quant.symmetric, *quant.clips]
            for layer, widths in self.activations.items()
            for bits, quant in widths.items()
            if isinstance(quant, DynamicActivationQuant)
        }
        return hash_json([hash_tensors(tensors), groups, [str(e) for e in self.entries()], dynamic, transforms])

    def fake_weight(self, name: str, bits: int, layer: nn.Module, weight: Tensor | None = None) -> Tensor:
        """The weight that a layer computes with at a width.

        Args:
            name: of the layer.
            bits: width.
            layer: the module.
            weight: its full-precision weight, while it computes with another one.
        """
        return fake_weight(layer, self.weights[name][bits], self.transforms.get(name), weight)

    def fake_input(self, name: str, bits: int, layer: nn.Module, x: Tensor, timestep: Tensor) -> Tensor:
        """Input of a layer after its quantizer.

        Args:
            name: of the layer.
            bits: width.
            layer: the module.
            x: its input ``[N, ...]``.
            timestep: ``[]``, ``[1]`` or ``[B]``.
        """
        quant, transform = self.activations[name][bits], self.transforms.get(name)
        kind = kind_of(layer)
        if isinstance(quant, DynamicActivationQuant):
            fake = quantize_dynamically(x, quant.forms[0], transform, kind)  # candidates have one form
        else:
            index = fewest_entries(self.groups[quant.groups].index(by_sample_or_token(timestep)))
            parameters = quant.scale, quant.zero_point, index, quant.group_bits or bits
            fake = quantize_input(x, *parameters, transform, kind, self.rows.get(name))
        if transform is None or transform.split is None or kind is None:
            return fake
        return (x - transform.outside(kind, x) + fake).to(x.dtype)  # the directions that are not quantized

    def subset(self, entries: list[Entry]) -> Candidates:
        """Only the candidates of some entries."""
        wanted = set(entries)

        def part(operand: Operand, table: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[int, Any]]:
            kept = {
                layer: {b: q for b, q in widths.items() if Entry(layer, operand, b) in wanted}
                for layer, widths in table.items()
            }
            return {layer: widths for layer, widths in kept.items() if widths}

        return replace(
            self,
            weights=part("weight", self.weights),
            activations=part("activation", self.activations),
            attention=part("activation", self.attention),
        )


def _tensors(quant: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a quantizer by name."""
    if isinstance(quant, AttentionPlan):
        for operand, each in quant.quantizers.items():
            yield from ((f"{operand}.{part}", tensor) for part, tensor in _tensors(each))
        return
    for part in ("scale", "zero_point", "codes", "group_scale"):
        if getattr(quant, part, None) is not None:
            yield part, getattr(quant, part)
