"""Pass ``rotation``: rotate the input channels of each layer where that lowers its error.

A range for all channels is set by the loudest. A rotation spreads each channel over a block of them, so that all are
about as loud; the weights that meet them absorb its inverse, and full precision stays as it was. Unlike a balance it
does not move the unevenness into the weights.

Layers that share an input share the rotation. It is computed when the layer runs, after the division by the balance:
diffusion models scale and shift channels by the timestep between one layer and the next, and a rotation does not pass
through that.

Sources: Ashkboos et al. 2024 (QuaRot), Hadamard matrices; Feng et al. 2025 (ConvRot), regular ones, in groups; from
recorded activations, as DiRotQ does it: the principal axes of each block, evened out by a Hadamard matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dq_plugins.passes.rotation.held_out_error import InputRows, held_out_error
from dq_plugins.passes.rotation.sampled_inputs import SampledInputs
from dq_plugins.passes.shared_inputs import layers_by_input, targets_of
from dq_plugins.plan import QuantPlan
from dq_plugins.plan.rotation import Rotation
from dq_plugins.quantized.layer_transform import LayerTransform, transform_of
from dq_plugins.quantized.rotate import Rotate, hadamard_matrix
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress

RotationMethod = Literal["hadamard", "regular-hadamard", "principal-axes"]
LEAST_BLOCK = 4


class ChannelRotation(Pass):
    """Rotate input channels so that one range fits all, where it lowers the error of the layer's output."""

    name = "rotation"
    after = ("calibration-timesteps", "channel-balance")

    class Options(PassOptions):
        """Options of ``rotation``.

        Attributes:
            methods: what is tried beside none.
            block: most channels that are rotated together: a rotation costs as many multiplications for each value.
            calls: recorded calls to learn from, spread evenly over the recording.
            rows: rows of a layer's input that count, for each call.
            groups: timestep groups with ranges of their own, by which rotations are compared.
            least_gain: share of its error that a layer must lose, or it stays as it is.
        """

        methods: tuple[RotationMethod, ...] = Field(("hadamard", "regular-hadamard"), min_length=1)
        block: int = Field(64, ge=LEAST_BLOCK)
        calls: int = Field(25, ge=1)
        rows: int = Field(24, ge=1)
        groups: int = Field(8, ge=1)
        least_gain: float = Field(0.05, ge=0, lt=1)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Sample the inputs in one sweep, then try the rotations input by input."""
        sharing = layers_by_input(context)
        calls = context.calibration.spread(self.options.calls)
        sampled = SampledInputs(context.denoiser, [names[0] for names in sharing], self.options.rows)
        for done, call in enumerate(calls.calls()):
            yield Progress(done, len(calls) + len(sharing), "inputs")
            sampled.see(call, context.generator("rows", str(call.index)))
        for done, names in enumerate(sharing):
            yield Progress(len(calls) + done, len(calls) + len(sharing), names[0])
            rotation = self._best(*sampled.rows_of(names[0], self.options.groups), names, plan, context)
            for name in names:
                plan.layers[name].rotation = rotation

    def _best(
        self, seen: InputRows, held_out: InputRows, names: Sequence[str], plan: QuantPlan, context: PassContext
    ) -> Rotation | None:
        layers = [context.denoiser.get_submodule(name) for name in names]
        planned = plan.layers[names[0]]
        own, targets = transform_of(planned), targets_of(names[0], plan, context)
        balance = None if own is None else own.balance
        least = held_out_error(layers, seen, held_out, own, targets) * (1 - self.options.least_gain)
        best = None
        for method in self.options.methods:
            rotation = rotation_of(method, layers[0], seen.values, self.options.block, balance)
            if rotation is None:
                continue
            error = held_out_error(layers, seen, held_out, LayerTransform(balance, Rotate(rotation)), targets)
            if error < least:
                best, least = rotation, error
        return best


def rotation_of(
    method: RotationMethod, layer: nn.Module, inputs: Tensor, block: int, balance: Tensor | None = None
) -> Rotation | None:
    """A rotation of a layer's input channels; None where no block of them has one.

    Args:
        method: ``"principal-axes"``: those of each block's second moments, then a Hadamard matrix, so that every
            channel of the block has the same mean square on ``inputs``.
        layer: the layer.
        inputs: rows of its input, ``[R, C, ...]``.
        block: most channels that are rotated together.
        balance: what they are divided by first, ``[C]``.
    """
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    assert isinstance(weight, Tensor)
    base = 4 if method == "regular-hadamard" else 2
    size = largest_block(weight.shape[1], block, base)
    if size < LEAST_BLOCK:
        return None
    if method != "principal-axes":
        return Rotation(method, size)
    if groups > 1:
        return None
    values = inputs.double().movedim(1, -1).reshape(-1, inputs.shape[1])
    if balance is not None:
        values = values / balance.double()
    blocks = values.unflatten(1, (-1, size)).transpose(0, 1)  # [B, R, b]
    axes = torch.linalg.eigh(blocks.transpose(1, 2) @ blocks).eigenvectors
    return Rotation("matrix", size, axes @ hadamard_matrix(size) * size**-0.5)


def largest_block(channels: int, most: int, base: int) -> int:
    """Largest power of ``base`` up to ``most`` that divides the channels.

    Example:
        >>> [largest_block(channels, 64, 2) for channels in (320, 96, 3)]
        [64, 32, 1]
    """
    block = 1
    while channels % (block * base) == 0 and block * base <= most:
        block *= base
    return block
