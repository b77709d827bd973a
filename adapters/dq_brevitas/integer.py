"""Integer quantizers in Brevitas form: scale, zero point and bit width in, dequantized value out.

Brevitas computes ``q = clip(round(x / s + z))``; this library and the integer kernels compute
``q = clip(round(x * (1 / s)) + z)`` (see `dq_plugins.affine`). The two differ by one code where the quotient lies
within a rounding error of a tie. `ReciprocalIntQuant` is the second form: quantizers made from a plan use it, so they
agree with the plan bit for bit. Quantizers chosen by hand keep Brevitas' form, so that one timestep group equals the
stock quantizer bit for bit; ``.let(int_quant=ReciprocalIntQuant)`` switches any of them.
"""

from __future__ import annotations

from dq_brevitas import host  # noqa: F401  isort: skip
from brevitas.core.quant import IntQuant
from torch import Tensor


class TimestepIntQuant(IntQuant):
    """Brevitas' integer quantizer for scales that may hold one entry per sample.

    A scale with dimensions would promote a half-precision input to float32, which the layer's weight is not; the output
    keeps the input's dtype. With a 0-d scale this is `IntQuant`, bit for bit.
    """

    def forward(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x``; ``scale`` and ``zero_point`` broadcast against it."""
        return super().forward(scale, zero_point, bit_width, x).to(x.dtype)


class ReciprocalIntQuant(IntQuant):
    """The quantizer of `dq_plugins.affine` for Brevitas: float32 arithmetic, reciprocal of the scale, then multiply."""

    def to_int(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        """Integer codes of ``x``, as float32."""
        x = self.input_view_impl(x).float()
        codes = self.float_to_int_impl(x * (1.0 / scale)) + zero_point
        return self.tensor_clamp_impl(codes, min_val=self.min_int(bit_width), max_val=self.max_int(bit_width))

    def forward(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x``, in its own dtype."""
        return super().forward(scale, zero_point, bit_width, x).to(x.dtype)
