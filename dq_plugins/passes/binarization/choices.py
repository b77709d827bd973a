"""Which layer trains how: BinaryDM's choice, read off the denoiser's graph.

Source: BinaryDM, sections 3.2 and 4.1. The paper names the first and last six timestep-embedding blocks of one U-Net,
which are those whose features are at least half as wide and high as the input. The same rule for any denoiser:

- first and last layers, and the embedding of the timestep: 8 bits;
- layers of the blocks at both ends whose features are at least half the input's side: two bases that become one;
- every other layer: one basis.

Where all blocks have features of that size (a transformer), the first and the last quarter of them count, as six of
24 do in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from math import prod

from dq_plugins.errors import DQError, PlanError
from dq_plugins.graph import LayerInfo, Partition
from dq_plugins.layer_kinds import LAYER_KINDS
from dq_plugins.plan import LayerPlan, QuantPlan
from dq_plugins.quantized.trained_layers import TRAINED, LayerChoice


@dataclass(frozen=True)
class BinaryDMChoices:
    """How every layer of a denoiser trains.

    Attributes:
        layers: choice by fully qualified name, in execution order.
        blocks: the blocks whose features are mimicked, in execution order.
        evolvable_blocks: the blocks with two bases.
        unquantized: layers left in full precision, and why.
    """

    layers: dict[str, LayerChoice]
    blocks: tuple[str, ...]
    evolvable_blocks: tuple[str, ...]
    unquantized: dict[str, str]

    def with_vanilla_binarizer(self) -> BinaryDMChoices:
        """The same layers with one basis everywhere: the baseline of the paper's tables."""
        layers = {n: LayerChoice("binary", c.act_bits) if c.binary else c for n, c in self.layers.items()}
        return BinaryDMChoices(layers, self.blocks, (), self.unquantized)


def _positions(layer: LayerInfo) -> int:
    return LAYER_KINDS[layer.kind].positions(layer.output_shape)


def block_positions(part: Partition) -> dict[str, int]:
    """Largest feature map of each block, in execution order. Layers the sample does not reach have none."""
    sizes: dict[str, int] = {}
    for layer in part.layers.values():
        if layer.block and layer.signature == "sample":
            sizes[layer.block] = max(sizes.get(layer.block, 0), _positions(layer))
    return sizes


def least_positions(part: Partition, side_ratio: float) -> float:
    """Pixels or tokens of features with ``side_ratio`` of the side of the noisy sample."""
    shape = part.graph.nodes[f"input:{part.sample_argument}"]["shape"]
    if len(shape) > 3:
        return prod(shape[2:]) * side_ratio ** (len(shape) - 2)
    return (shape[1] if len(shape) > 2 else 1) * side_ratio


def edge_blocks(part: Partition, side_ratio: float = 0.5) -> tuple[str, ...]:
    """Blocks at both ends of the denoiser with features of at least ``side_ratio`` of the input's side."""
    sizes = block_positions(part)
    order, least = list(sizes), least_positions(part, side_ratio)
    first = list(takewhile(lambda b: sizes[b] >= least, order))
    if len(first) == len(order):
        quarter = max(1, round(len(order) / 4)) if order else 0
        return tuple(dict.fromkeys(order[:quarter] + order[len(order) - quarter :]))
    last = list(takewhile(lambda b: sizes[b] >= least, reversed(order)))
    return tuple(b for b in order if b in {*first, *last})


def timestep_blocks(part: Partition) -> tuple[str, ...]:
    """Blocks with a layer of their own for the timestep, in execution order; all blocks where none has one."""
    order = list(block_positions(part))
    timed = {layer.block for layer in part.layers.values() if layer.signature in ("temporal", "mixed")}
    return tuple(b for b in order if b in timed) or tuple(order)


def binarydm_choices(
    part: Partition, act_bits: int | None = 8, *, edge_bits: int = 8, side_ratio: float = 0.5
) -> BinaryDMChoices:
    """BinaryDM's choice for every layer that runs.

    Args:
        part: from `dq_plugins.graph.partition`.
        act_bits: width of the inputs of binarized layers, 2 to 8; None leaves them in floating point.
        edge_bits: width of the inputs of the 8-bit layers, where ``act_bits`` is not None.
        side_ratio: least side of features, relative to the input's, for two bases.

    Raises:
        DQError: there is no layer to binarize.
    """
    evolvable_blocks = edge_blocks(part, side_ratio)
    # resampling layers lie between blocks: they go with the size they produce, unless size says nothing
    least = least_positions(part, side_ratio) if len(set(block_positions(part).values())) > 1 else float("inf")
    layers, unquantized = {}, {}
    for name, layer in part.layers.items():
        outside_time = not layer.block and layer.signature != "sample"
        if LAYER_KINDS[layer.kind].module not in TRAINED:
            unquantized[name] = f"a layer of kind {layer.kind} does not train quantized"
        elif layer.roles & {"first", "last"} or outside_time:
            layers[name] = LayerChoice("int8", edge_bits if act_bits else None)
        elif layer.block in evolvable_blocks or (not layer.block and _positions(layer) >= least):
            layers[name] = LayerChoice("evolvable", act_bits)
        else:
            layers[name] = LayerChoice("binary", act_bits)
    if not any(choice.binary for choice in layers.values()):
        raise DQError("no layer of this denoiser can be binarized: it has only first and last layers")
    return BinaryDMChoices(layers, timestep_blocks(part), evolvable_blocks, unquantized)


def _choice_of(name: str, layer: LayerPlan, evolvable: frozenset[str]) -> LayerChoice:
    act_bits = layer.activation.bits if layer.activation else None
    if layer.weight is not None and layer.weight.scheme == "binary":
        return LayerChoice("evolvable" if name in evolvable else "binary", act_bits)
    if layer.weight is None or layer.weight.bits != 8:
        found = layer.weight.bits if layer.weight else "no"
        raise PlanError(f"layer {name!r} has {found} weight bits in the plan; layers train with 1 or 8")
    return LayerChoice("int8", act_bits)


def choices_of(plan: QuantPlan) -> BinaryDMChoices:
    """How to train what a plan of the recipe ``binarydm`` says.

    Args:
        plan: with ``binary_training``, as the pass ``binarize`` writes it.

    Raises:
        PlanError: the plan has none, or gives a layer a width that cannot be trained.
    """
    training = plan.binary_training
    if training is None:
        raise PlanError(
            f"the plan (recipe {plan.recipe!r}) does not say how to train binary weights: make it with recipe "
            "'binarydm', or with a recipe that has the pass 'binarize'"
        )
    evolvable = frozenset(training.evolvable_layers)
    layers = {n: _choice_of(n, layer, evolvable) for n, layer in plan.layers.items() if layer.weight is not None}
    unquantized = {n: layer.why for n, layer in plan.layers.items() if layer.weight is None}
    return BinaryDMChoices(layers, training.mimicked_blocks, training.evolvable_blocks, unquantized)
