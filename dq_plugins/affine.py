"""The one meaning of a quantizer, shared by simulated and integer execution.

    q  = clip(round(x * (1 / s)) + z, q_min, q_max)        integers
    x^ = s * (q - z)                                       what the next operation sees

``round`` is to nearest, ties to even. The reciprocal is taken in float32 and multiplied (not divided), because
that is what torchao's and oneDNN's integer kernels do: the two executions then agree bit for bit on ``q``.

Shapes: ``scale`` and ``zero_point`` broadcast against ``x``. ``scale`` is float32, ``zero_point`` int32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dq_plugins.errors import DQError

MIN_BITS, MAX_BITS = 1, 16
# below it the reciprocal overflows float32, and 0 * inf is not 0: such a range counts as empty
SMALLEST_SCALE = 1e-35


def per_row(parameters: Tensor, rows: Tensor) -> Tensor:
    """``[O]`` (or ``[1]``) as a view that broadcasts against ``rows`` ``[O, ...]``, on its device.

    ``[O, P]`` stands for P groups of consecutive entries of dimension 1, and is repeated for each of them.
    """
    if parameters.dim() == 2:
        spread = parameters.repeat_interleave(rows.shape[1] // parameters.shape[1], 1)  # [O, C]
        return spread.reshape(*spread.shape, *[1] * (rows.dim() - 2)).to(rows.device)
    return parameters.reshape(-1, *[1] * (rows.dim() - 1)).to(rows.device)


def integer_range(bits: int, *, narrow: bool = False) -> tuple[int, int]:
    """Smallest and largest integer of a signed ``bits``-bit code.

    Args:
        bits: 1 to 16. One bit has the two codes -1 and 0 (use a binarizer for codes -1 and +1).
        narrow: leave out the most negative code, so that the range is symmetric around zero.

    Raises:
        DQError: ``bits`` is out of range.
    """
    if not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise DQError(f"a quantizer has {MIN_BITS} to {MAX_BITS} bits, got bits={bits!r}")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return (low + 1 if narrow and bits > 1 else low), high


def code_ranges(widths: Sequence[int | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest code at each width, int32, and where there is none, bool; ``[G]`` each.

    Args:
        widths: bits of a code; None: the value stays as it is. Its codes are those of the widest of the others.
    """
    widest = max(width for width in widths if width is not None)
    low, high = zip(*(integer_range(widest if width is None else width) for width in widths), strict=True)
    ends = (torch.tensor(end, dtype=torch.int32) for end in (low, high))
    return (*ends, torch.tensor([width is None for width in widths]))


def affine_parameters(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point that map the float range ``[low, high]`` onto the integers.

    The range is first widened to contain zero, so that zero is represented exactly (padding, ReLU).
    Symmetric: ``z = 0`` and ``s = max(|low|, |high|) / q_max``. An empty range gets scale 1.

    Args:
        low: lower clip bounds, any shape.
        high: upper clip bounds, same shape.
        bits: width of the code.
        symmetric: whether the zero point is fixed at 0.

    Returns:
        ``(scale, zero_point)``: float32 and int32, the shape of ``low``.
    """
    return parameters_for_codes(low, high, *integer_range(bits), symmetric=symmetric)


def parameters_for_codes(
    low: Tensor, high: Tensor, q_min: int | Tensor, q_max: int | Tensor, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """`affine_parameters` onto the codes from ``q_min`` to ``q_max``, which may differ from range to range."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) / (max(q_max, 1) if isinstance(q_max, int) else q_max)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        return torch.where(scale > SMALLEST_SCALE, scale, torch.ones_like(scale)), zero_point
    scale = (high - low) / (q_max - q_min)
    scale = torch.where(scale > SMALLEST_SCALE, scale, torch.ones_like(scale))
    zero_point = torch.clamp(q_min - torch.round(low / scale), q_min, q_max).to(torch.int32)  # type: ignore[arg-type]
    return scale, zero_point


def dynamic_parameters(
    x: Tensor, bits: int | Tensor, *, symmetric: bool, spatial: int = 0, clip: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """`affine_parameters` of every token of a linear layer's input, or every sample of a convolution's, from its own
    extremes.

    Args:
        x: ``[..., C]``, or ``[N, C, *positions]`` with ``spatial`` dimensions of positions; ``N`` may be missing.
        bits: width of the code; or the largest code, where units differ, ``[..., 1]`` or ``[N, 1, *1]``.
        symmetric: whether the zero point is fixed at 0.
        spatial: number of dimensions that the layer slides over.
        clip: what the extremes are multiplied by; a tensor may require gradients.

    Returns:
        ``(scale, zero_point)``: float32 and int32, ``[..., 1]`` or ``[N, 1, *1]``.
    """
    axes = tuple(range(-1 - spatial, 0))
    # not aminmax, which is more than ten times slower along a dimension on a CPU
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    q_min, q_max = integer_range(bits) if isinstance(bits, int) else (-1 - bits, bits)
    return parameters_for_codes(low.float() * clip, high.float() * clip, q_min, q_max, symmetric=symmetric)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, q_min: int | Tensor, q_max: int | Tensor) -> Tensor:
    """Integer codes of ``x``, still in a floating dtype (the caller picks the storage dtype)."""
    return torch.clamp(torch.round(x * (1.0 / scale)) + zero_point, q_min, q_max)  # type: ignore[arg-type]


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | int) -> Tensor:
    """Float values of integer codes: ``s * (q - z)``."""
    return (codes - zero_point) * scale


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | int, q_min: int | Tensor, q_max: int | Tensor
) -> Tensor:
    """Quantize and dequantize: the simulated quantizer. Computed in float32, returned in ``x.dtype``."""
    if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in (x, scale, zero_point)):
        return dequantize(quantize(x.float(), scale, zero_point, q_min, q_max), scale, zero_point).to(x.dtype)
    # the same operations in one piece of memory
    values = (x.float() * (1.0 / scale)).round_().add_(zero_point).clamp_(q_min, q_max)
    return values.sub_(zero_point).mul_(scale).to(x.dtype)
