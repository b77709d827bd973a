"""Activation codes by ranges of their own: of each token of a linear layer, of each sample of a convolution.

On a CPU a kernel of ours finds the ranges and makes the codes, in eager mode and in graphs for inference.
There what lies before may become part of it (`dq_torchao.kernels.before_codes`), as of codes by given ranges:
normalisation, factors and addends of channels, SiLU. Elsewhere a compiler fuses the definition.

Shapes: ``x [..., C]``, or ``[N, C, *positions]``; a unit is a token or a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from dq_plugins.affine import SMALLEST_SCALE, dynamic_parameters, integer_range
from dq_plugins.plan import DynamicActivationQuant
from dq_torchao.kernels import native
from dq_torchao.kernels.codes import activation_codes, code_offset, width_and_clip
from dq_torchao.kernels.product import available
from dq_torchao.kernels.tracing import is_merged

FEWEST = 1 << 14
"""Values below which a compiler's loop is faster than a call."""
PAIRS = 2
"""Most pairs of a factor and an addend that the kernel takes on the way."""


def dynamic_codes(
    x: Tensor,
    factor: Tensor | None,
    quant: DynamicActivationQuant,
    spatial: int,
    form: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of `dq_plugins.quantized.input_quantizers.quantize_dynamically`, stored as `activation_codes` stores them.

    Args:
        x: floating-point activations.
        factor: float32, broadcasts against ``x``: the reciprocal of the balance of the channels; None: 1.
        quant: width and form.
        spatial: number of dimensions that the layer slides over.
        form: where groups of timesteps have widths of their own: largest code and clip, ``[]``, or as they broadcast
            against ``x``, float32. Then ``quant`` has the widest of the widths.

    Returns:
        codes in the shape of ``x``; scale, float32, and zero point of the stored codes, int32, ``[..., 1]`` or
        ``[N, 1, *1]``.
    """
    if (form is None or form[0].dim() == 0) and _in_kernel(x, factor, spatial):
        given = x, factor, quant.bits, quant.symmetric, quant.clip, spatial, ()
        call = torch.ops.dq_torchao.dynamic_codes if torch.compiler.is_compiling() else _one_call
        return call(*given, form=None if form is None else torch.stack(form))
    values = x.float() if factor is None else x.float() * factor
    bits, clip = (quant.bits, quant.clip) if form is None else form
    scale, zero_point = dynamic_parameters(values, bits, symmetric=quant.symmetric, spatial=spatial, clip=clip)
    stored = zero_point + code_offset(x.device)
    codes = activation_codes(values, scale.reciprocal(), stored, quant.bits)  # of the widest form
    if form is not None:
        low, high = (bound + code_offset(x.device) for bound in (-1 - form[0], form[0]))
        codes = torch.minimum(torch.maximum(codes, low.to(codes.dtype)), high.to(codes.dtype))
    return codes, scale, stored


def _in_kernel(x: Tensor, factor: Tensor | None, spatial: int) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    if factor is not None and (factor.dtype != torch.float32 or factor.numel() != x.shape[-1 - spatial]):
        return False
    if torch.compiler.is_compiling():
        return is_merged(x.device) and x.numel() >= FEWEST and _dense(x, factor, spatial) and available()
    return x.numel() > 0 and _dense(x, factor, spatial) and not native.why_not()


def _dense(x: Tensor, factor: Tensor | None, spatial: int) -> bool:
    """Whether channels lie side by side, or nothing depends on them."""
    if spatial and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return True
    return x.is_contiguous() and (not spatial or (factor is None and x.dim() == spatial + 2))


torch.library.define(
    "dq_torchao::dynamic_codes",
    "(Tensor x, Tensor? factor, int bits, bool symmetric, float clip, int spatial, Tensor?[] affine, "
    "float? eps=None, bool silu=False, int groups=0, *, Tensor? form=None) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides,),
)


def _results(x: Tensor, spatial: int) -> tuple[Tensor, Tensor, Tensor]:
    units = (*x.shape[: x.dim() - 1 - spatial], *[1] * (1 + spatial))
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty(units), x.new_empty(units, dtype=torch.int32)


@torch.library.register_fake("dq_torchao::dynamic_codes")
def _(x: Tensor, factor, bits, symmetric, clip, spatial: int, *_, **__) -> tuple[Tensor, Tensor, Tensor]:
    return _results(x, spatial)


class _Before(NamedTuple):
    """What is done to the values first, see `_one_call`."""

    affine: Sequence[Tensor | None]
    eps: float | None
    silu: bool
    groups: int


def _one_call(
    x: Tensor,
    factor: Tensor | None,
    bits: int,
    symmetric: bool,
    clip: float,
    spatial: int,
    affine: Sequence[Tensor | None],
    eps: float | None = None,
    silu: bool = False,
    groups: int = 0,
    *,
    form: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dynamic_codes` of what becomes of ``x`` on the way.

    Args:
        x: float32, dense; channels last where anything depends on them.
        factor: see `dynamic_codes`.
        bits: width of the codes.
        symmetric: whether the zero point of the signed codes is 0.
        clip: share of the extremes at which values are cut off.
        spatial: see `dynamic_codes`.
        affine: up to `PAIRS` pairs of factors and addends of channels, float32: ``[R, C]`` when reshaped,
            R a divisor of the number of units.
        eps: of a normalisation of ``x`` before that (`dq_torchao.kernels.norm`), or None: of layers where there are no
            spatial dimensions, else of groups, and the first pair then is its weight and bias.
        silu: whether SiLU of the result is taken last.
        groups: of channels, of group normalisation.
        form: largest code and clip, float32 ``[2]``, in place of those above: they depend on the timestep.

    Raises:
        MemoryError: to keep the values of a unit.
    """
    bits, clip = (bits, clip) if form is None else width_and_clip(form)
    before = _Before(affine, eps, silu, groups)
    by_channel = factor is not None or eps is not None or silu or len(affine) > 0
    x = _laid_out(x, spatial, by_channel)
    results, quant = _results(x, spatial), DynamicActivationQuant(bits, symmetric, clip)
    _run(x, results, results[1].numel(), factor, quant, spatial if by_channel else None, before)
    return results


torch.library.impl("dq_torchao::dynamic_codes", "CPU")(_one_call)


torch.library.define(
    "dq_torchao::activation_codes_after",
    "(Tensor x, Tensor factor, Tensor zero_point, int bits, int spatial, Tensor?[] affine, float? eps=None, "
    "bool silu=False, int groups=0) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,),
)


@torch.library.register_fake("dq_torchao::activation_codes_after")
def _(x: Tensor, *_, **__) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


def activation_codes_after(
    x: Tensor,
    factor: Tensor,
    zero_point: Tensor,
    bits: int,
    spatial: int,
    affine: Sequence[Tensor | None],
    eps: float | None = None,
    silu: bool = False,
    groups: int = 0,
) -> Tensor:
    """`dq_torchao.kernels.codes.activation_codes` of what becomes of ``x`` on the way: see `_one_call`.

    Args:
        x: and so on, see `_one_call`.
        factor: float32, ``[1]`` or one for each channel.
        zero_point: int32 ``[1]``, of the stored codes.
        bits: width of the codes.
        spatial: see `dynamic_codes`.
        affine: see `_one_call`.
        eps: likewise.
        silu: likewise.
        groups: likewise.
    """
    x = _laid_out(x, spatial, by_channel=True)
    codes = torch.empty_like(x, dtype=torch.uint8)
    units = len(x) if spatial else x.numel() // x.shape[-1]
    form, before = DynamicActivationQuant(bits), _Before(affine, eps, silu, groups)
    _run(x, (codes, None, None), units, factor, form, spatial, before, zero_point)
    return codes


torch.library.impl("dq_torchao::activation_codes_after", "CPU")(activation_codes_after)


def _run(
    x: Tensor,
    results: tuple[Tensor, Tensor | None, Tensor | None],
    units: int,
    factor: Tensor | None,
    form: DynamicActivationQuant,
    spatial: int | None,
    before: _Before,
    given_zero: Tensor | None = None,
) -> None:
    """``spatial``: None where nothing depends on the channels; ``given_zero``: of a given range, with its factor."""
    channels, total = x.shape[-1 - (spatial or 0)], x.numel()
    rows = total // (units * channels) if spatial else 1
    factor = None if factor is None else factor.contiguous()
    parts = [None if part is None else _rows(part, channels, spatial or 0) for part in before.affine]
    fields = [field for part in parts for field in _fields(part, channels, units)]
    low, high = integer_range(form.bits)
    job = _JOB.pack(
        x.data_ptr(), *map(native.address, results), native.address(factor), units, rows, total // (units * rows),
        form.symmetric, low, high, code_offset(x.device), SMALLEST_SCALE, form.clip,
        before.eps is not None and not before.groups, before.eps or 0.0,
        *fields, *_NO_PART * (2 * PAIRS - len(parts)), before.silu, torch.get_num_threads(),
        native.address(given_zero), factor is not None and factor.numel() == 1, before.groups,
    )  # fmt: skip
    if not native.library().dq_dynamic_codes(job):
        raise MemoryError("no memory for the values of a sample")


def _laid_out(x: Tensor, spatial: int, by_channel: bool) -> Tensor:
    last = spatial and x.dim() == 4 and (by_channel or not x.is_contiguous())
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _rows(part: Tensor, channels: int, spatial: int) -> Tensor:
    """``[R, C]``; as it is where R is 1."""
    part = part if part.numel() == channels else part.reshape(-1, channels)
    axis = -1 if part.dim() == 2 else -1 - spatial
    return part if channels == 1 or part.stride(axis) == 1 else part.contiguous()


def _fields(part: Tensor | None, channels: int, units: int) -> tuple[int, int, int]:
    """Where a factor or an addend lies, the distance of its rows, and units that share one."""
    if part is None:
        return _NO_PART
    rows = part.numel() // channels
    return part.data_ptr(), 0 if rows == 1 else part.stride(0), units // rows


_NO_PART = 0, 0, 1
_JOB = Struct("12q2dqd17q")
"""The fields of a job in dynamic_codes.cpp."""
