"""Products of codes, for rows of the input that have parameters of their own.

Such rows are samples of several timesteps; with dynamic ranges, tokens, or the samples of a convolution. The kernel of
ours takes the parameters of tokens and of samples (`dq_torchao.kernels.product`). The others take one scale a call, so
rows are multiplied as bare codes, and rescaled afterwards:

    y[n, o] = s[n] * s_w[o] * (sum_k q[n, k] w[o, k])  -  s[n] z[n] * s_w[o] sum_k w[o, k]  +  b[o] + correction[n, o]

A convolution's border must then hold each row's own code of zero, so those kernels may not add it.

Shapes: ``O`` outputs, ``C`` input channels, ``G`` timestep groups, ``N`` batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq_plugins.plan import DynamicActivationQuant
from dq_plugins.quantized.output_correction import rows_for_output
from dq_plugins.timesteps import RowOrder, select_for_input
from dq_torchao.kernels import code_offset, dynamic_codes, kernel_dtype, weight_code_sum
from dq_torchao.releasable_weight import ReleasableWeight
from dq_torchao.shared_codes import ParameterKey, shared_codes


def result_dtype(x: Tensor) -> torch.dtype:
    """Dtype of what PyTorch's own layer makes of ``x``: that of ``x``, or autocast's, which leaves float64 alone."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, which a compiler need not trace where it does nothing."""
    return x if x.dtype == dtype else x.to(dtype)


class RowRanges(ReleasableWeight):
    """A layer in integers that may get rows with parameters of their own; subclasses know the kernel that multiplies.

    Attributes:
        bias: the layer's own, ``[O]``.
        bias_correction: float32 ``[G, O]``; None without one, and where it has one row, which is part of the bias.
        rows: where the samples of a call are in its input.
    """

    exact_state = (*ReleasableWeight.exact_state, "bias_correction")

    bias: Tensor | None
    bias_correction: Tensor | None
    rows: RowOrder | None = None
    parameter_key: ParameterKey
    act_forms: Tensor | None

    def _dynamic(
        self, x: Tensor, quant: DynamicActivationQuant, row: Tensor | None, group: Tensor | None = None
    ) -> Tensor:
        """Every token, or sample, by its own range: `dq_plugins.quantized.input_quantizers.quantize_dynamically`.

        ``group``: of the call, or of its samples, where groups have widths of their own.
        """
        compiling, form = torch.compiler.is_compiling(), None
        if group is not None and group.numel() == 1 and not compiling:
            quant = quant.forms[int(group)]
        elif group is not None and self.act_forms is not None:
            where = group, x, self._kind.spatial, self.rows
            largest, clip = (select_for_input(table, *where) for table in self.act_forms.unbind(1))
            form = largest, clip
        rotated = self.input_rotation is not None
        values, factor = (self._transformed(x), None) if rotated else (x, self.inverse_balance)
        shared = None if rotated or compiling or form is not None else self.parameter_key.of(factor)
        codes, scale, stored = shared_codes(
            self.context.running.selection,
            x,
            shared and (quant, shared),
            lambda: dynamic_codes(values, factor, quant, self._kind.spatial, form),
        )
        one_row = row is None or row.numel() == 1  # of corrections
        bias, dtype = self._bias(row if one_row else None), kernel_dtype(x)
        if one_row and self.takes_rows(codes, dtype, bias):
            own = scale.reshape(-1), stored.reshape(-1)
            return self.multiply(self._padded_codes(codes, stored), *own, bias, dtype).to(result_dtype(x))
        # not for a linear layer's only token, which would come out an ulp other than among others
        if one_row and self._kind.spatial and scale.numel() == 1:
            one_range = scale.reshape(1), stored.reshape(1)
            codes = self._padded_codes(codes, stored)
            return self.multiply(codes, *one_range, bias, dtype).to(result_dtype(x))
        codes = self._padded_codes(codes, stored, wholly=True)
        zero_point = None if quant.symmetric else stored - code_offset(x.device)
        return self._by_rows(codes, scale, zero_point, row).to(result_dtype(x))

    def _padded_codes(self, codes: Tensor, zero_point: Tensor, wholly: bool = False) -> Tensor:
        """`padded`, with the code of zero in the place of zeros; bytes wrap around."""
        if self.padded(codes[:0], wholly).shape == codes[:0].shape:
            return codes
        zero = zero_point.to(codes.dtype)
        return self.padded(codes - zero, wholly) + zero

    def _by_rows(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, row: Tensor | None) -> Tensor:
        """The kernels take one scale: multiply the bare codes, then apply each row's own parameters."""
        one = scale.new_ones(1)
        bare_zero = scale.new_full((1,), code_offset(codes.device), dtype=torch.int32)
        y = self.multiply(codes, one, bare_zero, None, torch.float32, wholly=True)
        offset = self._offset(y, row)
        # in place: in eager mode, memory for another result costs more than the product
        if zero_point is not None and self._kind.spatial:
            shift = scale * zero_point * self.code_sums(codes)  # [N, O, *1]
            offset = -shift if offset is None else offset - shift
        elif zero_point is not None:
            y.addcmul_(zero_point.to(y.dtype), self.code_sums(codes), value=-1)
        if offset is None:
            return y.mul_(scale)
        if torch.compiler.is_compiling():
            return y * scale + offset
        return torch.addcmul(offset.detach().to(y.dtype), y.detach(), scale, out=y)

    def _offset(self, y: Tensor, row: Tensor | None) -> Tensor | None:
        """Bias and correction, as they broadcast against the output ``y``."""
        if row is None or row.numel() == 1 or self.bias_correction is None:
            bias = self._bias(row)
            return None if bias is None else self._kind.per_output(bias)
        rows, bias = rows_for_output(self._kind, self.bias_correction, row, y, self.rows), self._bias(None)
        return rows if bias is None else rows + self._kind.per_output(bias)

    def code_sums(self, codes: Tensor) -> Tensor:
        """``s_w sum_k w``, as it broadcasts against the output; ``codes`` are those of a wholly padded input."""
        return self._kind.per_output(self.weight_scale * weight_code_sum(*self.stored_weight))

    def padded(self, x: Tensor, wholly: bool = False) -> Tensor:
        """``x`` with the border that the kernel does not add by itself; ``wholly``: with all of it."""
        return x

    def takes_rows(self, codes: Tensor, dtype: torch.dtype, bias: Tensor | None) -> bool:
        """Whether `multiply` takes a scale and a zero point for each token or sample."""
        return False

    def multiply(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        wholly: bool = False,
    ) -> Tensor:
        """``s * s_w * sum (q - z) w + b`` by the integer kernel; ``wholly``: the codes are padded already.

        Scale and zero point: ``[1]``, or where `takes_rows` says so of each token or sample.
        """
        raise NotImplementedError

    def _transformed(self, x: Tensor) -> Tensor:
        """The input divided by the balance, and rotated: float32."""
        x = x.float() if self.inverse_balance is None else x.float() * self.inverse_balance
        return x if self.input_rotation is None else self.input_rotation(x, self._kind.channel_axis)

    def _bias(self, row: Tensor | None) -> Tensor | None:
        """``[O]``: the layer's own and the correction in one row."""
        bias = self.bias
        if self.bias_correction is not None and row is not None:
            correction = self.bias_correction.index_select(0, row).reshape(-1)
            bias = correction if bias is None else correction + bias
        return None if bias is None else in_dtype(bias, kernel_dtype(bias))
