"""Rows of a quantized layer's output that are known in advance, because the input row is always the same.

The layer itself runs as it is, simulated or in integers, on all tokens; its activation range is that of the other
tokens, so the outlier rows come out wrong, and are replaced:

- by the row computed once in full precision, for samples whose input row is the one it was computed from;
- else by a live row: the input row in floating point times the layer's (quantized) weight. This is the case of a zeroed
  negative prompt, a weighted prompt or another encoder; only the rounding of the weight remains.

Two hooks do it, so one code serves every backend, and it composes with whatever the layer is. The choice is made
sample by sample with tensor operations (no recompilation, no host sync); on the host in eager mode the live rows are
skipped when no sample needs them.

Shapes: ``N`` samples, ``L`` tokens, ``P`` outlier tokens, ``D`` input and ``O`` output features.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq_plugins.plan import QuantPlan

WeightOf = Callable[[nn.Module], Tensor]


def own_weight(layer: nn.Module) -> Tensor:
    """The floating-point weight that a layer computes with, ``[O, D]``."""
    weight: Any = layer.weight
    beside = getattr(layer, "input_beside", None)
    if beside == "whole":  # a low-rank branch stands beside the weight
        return sum(weight.chunk(2, 1))  # type: ignore[return-value]
    if beside == "inside":
        split: Any = layer.input_quantizer.split  # type: ignore[union-attr]
        channels = split.basis.shape[1]
        return weight[:, :channels] + split.spread(weight[:, channels:])
    return weight.dequantize() if hasattr(weight, "tensor_impl") else weight


class ExactTokens(nn.Module):
    """Known output rows of one layer.

    Args:
        positions: of the outlier tokens.
        rows: input rows ``[P, D]`` that the values belong to.
        values: output rows ``[P, O]``, bias included.
        weight_of: gives the weight for live rows.
    """

    dq_quantizer_state = True  # no weights of the denoiser: left out of its hash

    positions: Tensor
    rows: Tensor
    values: Tensor

    def __init__(
        self, positions: tuple[int, ...], rows: Tensor, values: Tensor, weight_of: WeightOf = own_weight
    ) -> None:
        super().__init__()
        self.register_buffer("positions", torch.tensor(positions, dtype=torch.int64, device=values.device))
        self.register_buffer("rows", rows)
        self.register_buffer("values", values)
        self.weight_of = weight_of
        self.seen: Tensor | None = None

    def look(self, x: Tensor) -> None:
        """Keep the outlier rows of the raw input ``[N, L, D]``, before anything quantizes it."""
        self.seen = x.index_select(1, self.positions) if x.dim() == 3 else None

    def without_known(self, x: Tensor, change: Tensor) -> Tensor:
        """A change of the output ``[N, L, O]`` for raw inputs ``x``, none where the exact rows stand."""
        if x.dim() != 3:
            return change
        known = (x.index_select(1, self.positions) == self.rows.to(x.dtype)).all(-1, keepdim=True)  # [N, P, 1]
        live = change.index_select(1, self.positions)
        return change.index_copy(1, self.positions, torch.where(known, torch.zeros_like(live), live))

    def replace(self, layer: nn.Module, output: Tensor) -> Tensor:
        """Put the exact rows into the layer's output ``[N, L, O]``."""
        seen, self.seen = self.seen, None
        if seen is None:
            return output
        same = (seen == self.rows.to(seen.dtype)).all(-1, keepdim=True)  # [N, P, 1]
        values = self.values.to(output.dtype).expand(len(seen), -1, -1)
        if torch.compiler.is_compiling() or same.device.type != "cpu" or not bool(same.all()):
            bias: Any = getattr(layer, "bias", None)
            weight = self.weight_of(layer).to(seen.dtype)
            live = F.linear(seen, weight, None if bias is None else bias.to(seen.dtype)).to(output.dtype)
            values = torch.where(same, values, live)
        return output.index_copy(1, self.positions, values)


def _look(layer: nn.Module, args: tuple[Any, ...]) -> None:
    layer.exact_tokens.look(args[0])  # type: ignore[operator]


def _replace(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return layer.exact_tokens.replace(layer, output)  # type: ignore[operator]


def exact_tokens(layer: nn.Module, tokens: ExactTokens) -> ExitStack:
    """Give a layer its exact rows.

    Args:
        layer: any linear layer, quantized or not, with a ``weight`` and a ``bias``.
        tokens: its known rows.

    Returns:
        What takes them away again when it is closed.
    """
    layer.exact_tokens = tokens
    stack = ExitStack()
    stack.callback(delattr, layer, "exact_tokens")
    stack.enter_context(layer.register_forward_pre_hook(_look, prepend=True))
    stack.enter_context(layer.register_forward_hook(_replace))
    return stack


def install_tokens(model: nn.Module, plan: QuantPlan, weight_of: WeightOf = own_weight) -> ExitStack:
    """Give every layer of ``plan.outlier_rows`` its exact rows: for good, or for the length of a ``with`` block.

    Args:
        model: the denoiser, quantized or not.
        plan: the plan.
        weight_of: gives the floating-point weight that a layer of this backend computes with, for live rows.

    Returns:
        What takes the rows away again when it is closed.
    """
    stack = ExitStack()
    for name, known in plan.outlier_rows.items():
        layer = model.get_submodule(name)
        device = next((t.device for t in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
        inputs, outputs = (rows.to(device, copy=True) for rows in (known.inputs, known.outputs))
        stack.enter_context(exact_tokens(layer, ExactTokens(known.positions, inputs, outputs, weight_of)))
    return stack
