"""What a transform of a layer's input leaves of its output's error, when input and weight are quantized.

Ranges come from some rows of the input and are judged on others, timestep group by timestep group.

Shapes: ``R`` rows, ``C`` input channels, ``P`` groups of channels of a convolution, ``K`` products per output, ``O``
outputs, ``G`` timestep groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.affine import affine_parameters, fake_quantize, integer_range
from dq_plugins.layer_kinds import kind_of
from dq_plugins.plan import Targets
from dq_plugins.quantized.input_rows import weight_matrix
from dq_plugins.quantized.layer_transform import LayerTransform, transformed_input, transformed_weight
from dq_plugins.quantized.weight_scale import layer_quantizer

SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Of the range of the rows that ranges come from; the one of least error holds."""
OUTPUTS = 128
"""Of a layer, that are enough to tell."""


@dataclass(frozen=True)
class InputRows:
    """Rows of a layer's input, as inputs of one position each.

    Attributes:
        values: ``[R, C]`` of a linear layer, patches ``[R, C, *kernel]`` of a convolution.
        group: timestep group of each, int64 ``[R]``.
    """

    values: Tensor
    group: Tensor

    @classmethod
    def of(cls, layer: nn.Module, rows: Tensor, group: Tensor) -> InputRows:
        """Rows ``[P, R, K]`` as `dq_plugins.quantized.input_rows.input_rows` gives them."""
        kind, weight = kind_of(layer), layer.weight
        assert kind is not None
        assert isinstance(weight, Tensor)
        return cls(rows.transpose(0, 1).reshape(rows.shape[1], -1, *kind.kernel(weight.shape)), group)


def matrices(layer: nn.Module, values: Tensor) -> Tensor:
    """``[R, C, *kernel]`` as ``[P, R, K]``, which `weight_matrix` multiplies."""
    return values.reshape(len(values), getattr(layer, "groups", 1), -1).transpose(0, 1)


def held_out_error(
    layers: Sequence[nn.Module],
    seen: InputRows,
    held_out: InputRows,
    transform: LayerTransform | None,
    targets: Targets,
    inputs: Tensor | None = None,
) -> float:
    """Squared error of the outputs of layers of one input over their power, on rows that gave no ranges.

    Args:
        layers: of one input.
        seen: what ranges come from.
        held_out: what they are judged on.
        transform: of the input.
        targets: widths and form of the quantizers.
        inputs: `fake_inputs`, where they are known.
    """
    inputs = fake_inputs(layers[0], seen, held_out, transform, targets) if inputs is None else inputs
    error = power = 0.0
    for layer in layers:
        own: Any = layer.weight
        some = _some_outputs(layer)
        weight = transformed_weight(layer, transform)[some]
        quant = layer_quantizer(layer, targets.weight_bits, targets, method="coarse", transform=transform, outputs=some)
        fake = quant.fake_quantize(weight).float()
        exact = matrices(layer, held_out.values) @ weight_matrix(layer, own[some].float()).transpose(1, 2)
        found = matrices(layer, inputs) @ weight_matrix(layer, fake).transpose(1, 2)
        if transform is not None and (branch := transform.branch(own)) is not None:
            branch = weight_matrix(layer, branch[some].float())
            found = found + matrices(layer, held_out.values) @ branch.transpose(1, 2)
        error += float((found - exact).double().square().sum())
        power += float(exact.double().square().sum())
    return error / max(power, 1e-300)


def fake_inputs(
    layer: nn.Module, seen: InputRows, held_out: InputRows, transform: LayerTransform | None, targets: Targets
) -> Tensor:
    """Rows of a transformed input, quantized with ranges of others, ``[R, C, ...]``."""
    inputs = transformed_input(layer, transform, held_out.values)
    if targets.act_bits is None:
        return inputs
    ranges = _ranges(transformed_input(layer, transform, seen.values), seen.group, targets)
    scale, zero = (table[held_out.group].reshape(-1, *[1] * (inputs.dim() - 1)) for table in ranges)
    return fake_quantize(inputs, scale, zero, *integer_range(targets.act_bits))


def _some_outputs(layer: nn.Module) -> slice:
    """Evenly spaced, `OUTPUTS` or a few more; all where a part of the weight is not that of some outputs."""
    kind, weight = kind_of(layer), layer.weight
    assert kind is not None
    assert isinstance(weight, Tensor)
    apart = kind.scale_per_row and getattr(layer, "groups", 1) == 1
    return slice(None, None, max(len(weight) // OUTPUTS, 1) if apart else 1)


def _ranges(values: Tensor, group: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each timestep group, ``[G]``, of least squared error."""
    bits, count = targets.act_bits, int(group.max()) + 1
    assert bits is not None
    flat = values.flatten(1)  # [R, n]
    low = torch.zeros(count).scatter_reduce(0, group, flat.amin(1), "amin")
    high = torch.zeros(count).scatter_reduce(0, group, flat.amax(1), "amax")
    least = torch.full((count,), torch.inf)
    best = affine_parameters(low, high, bits, symmetric=targets.symmetric_acts)
    for shrink in SHRINKS:
        scale, zero = affine_parameters(low * shrink, high * shrink, bits, symmetric=targets.symmetric_acts)
        fake = fake_quantize(flat, scale[group][:, None], zero[group][:, None], *integer_range(bits))
        error = torch.zeros(count).index_add_(0, group, (fake - flat).square().sum(1))
        better = error < least
        least = torch.minimum(error, least)
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
    return best
