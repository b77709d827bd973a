"""Attention of a plan -> integer products where there is a kernel and they pay, else PyTorch's own, and the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq_plugins.affine import per_row
from dq_plugins.compiled import uncompiled
from dq_plugins.errors import DQError
from dq_plugins.metrics.latency import compare_latency, thread_clock
from dq_plugins.plan import AttentionPlan
from dq_plugins.quantized.attention import (
    SITE,
    ObservedAttention,
    QuantizedAttention,
    attending,
    full_mask,
    quantize_attention,
    simulated_attention,
)
from dq_plugins.quantized.input_quantizers import ActivationQuantizer
from dq_plugins.timesteps import TimestepContext, fit_to_input
from dq_torchao.columns import selected_column
from dq_torchao.kernels import activation_codes, code_offset, is_merged
from dq_torchao.kernels.attention import attention_kernel, int8_attention
from dq_torchao.layer import NO_GRADIENT, refuse_frozen_group
from dq_torchao.report import Execution, Timing

FLOATING = "scaled_dot_product_attention"


class IntegerAttention(QuantizedAttention):
    """Both products in integers, ranges by timestep group."""

    @property
    def device(self) -> torch.device:
        """Where the ranges lie."""
        scale: Any = self.query.scale
        return scale.device

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
    ) -> Tensor:
        """See `QuantizedAttention.attend`; what the kernel does not take is simulated, with the same values."""
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            raise DQError(NO_GRADIENT)
        operands: list[Any] = [(self.query, query), (self.key, key), (self.value, value)]
        per_token = any(quantizer.context.index(quantizer.groups).dim() > 1 for quantizer, _ in operands)
        empty = not (query.numel() and key.numel() and value.numel())
        if per_token or empty or not 3 <= query.dim() <= 4 or scale <= 0 or query.device.type != "cpu":
            return super().attend(query, key, value, mask, is_causal, scale)
        refuse_frozen_group(query.device, self.query.context)
        ranges = [_selected(quantizer, x) for quantizer, x in operands]
        tables = _same_length([table for scale, zero_point, _ in ranges for table in (scale, zero_point)])
        if is_causal and mask is not None:
            full_mask(query, key, mask, is_causal)  # an error
        dtype, bits = query.dtype, self.query.bits
        query, key, value = (
            x if factor is None else activation_codes(x, _of_samples(factor, x), _of_samples(zero_point, x), bits)
            for (_, x), (_, zero_point, factor) in zip(operands, ranges, strict=True)
        )
        if query.dim() == 3:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            mask = mask.unsqueeze(1) if mask is not None and mask.dim() == 3 else mask
            return int8_attention(query, key, value, mask, is_causal, scale, *tables, bits, dtype).squeeze(1)
        return int8_attention(query, key, value, mask, is_causal, scale, *tables, bits, dtype)


def _selected(quantizer: ActivationQuantizer, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the call selects, or every sample of ``x``: ``[1]`` or ``[B]`` each.

    Returns:
        Scale and zero point of stored codes; then, in a graph for inference, in which what makes ``x`` makes its codes,
        the factor of these, else None.
    """
    column = selected_column(quantizer, quantizer.context)
    if column is not None:
        return column.scale, column.zero_point, column.factor
    index = quantizer.context.index(quantizer.groups).to(quantizer.scale.device)
    if len(quantizer.scale) == 1:
        index = index[:1]
    fitted = index if len(index) == 1 else fit_to_input(index, x, spatial=1, rows=quantizer.rows)
    scale, zero_point = (table.index_select(0, fitted) for table in (quantizer.scale, quantizer.zero_point))
    return scale, zero_point + code_offset(x.device), scale.reciprocal() if is_merged(x.device) else None


def _of_samples(values: Tensor, x: Tensor) -> Tensor:
    """``[1]`` or ``[B]`` as it broadcasts against ``x``."""
    return values if len(values) == 1 else per_row(values, x)


def _same_length(tables: list[Tensor]) -> list[Tensor]:
    longest = max([len(table) for table in tables])
    return [table if len(table) == longest else table.expand(longest) for table in tables]


def lower_attention(
    module: nn.Module, plan: AttentionPlan, context: TimestepContext, timing: Timing | None = None
) -> QuantizedAttention | None:
    """The integer attention of a module, and on ``module.execution`` how it runs.

    Args:
        module: it attends.
        plan: its decisions.
        context: of the denoiser.
        timing: of both forms; it stays PyTorch's where that is faster.

    Returns:
        None where it stays PyTorch's.
    """
    site = integer_attention(module, plan, context)
    kernel = attention_kernel(site.device)
    reason = kernel.unsupported_reason
    if not reason and timing is not None and not timing.integer_pays:
        reason = str(timing)
    if reason:
        module.execution = Execution("full precision", plan.width, FLOATING, "floating point", reason)  # type: ignore[assignment]
        return None
    module.execution = Execution("integer", plan.width, kernel.name, kernel.compute, str(timing or ""))  # type: ignore[assignment]
    return site


def restore_attention(
    module: nn.Module, plan: AttentionPlan, context: TimestepContext, execution: Execution
) -> QuantizedAttention | None:
    """The attention of a module as it was when it was saved."""
    module.execution = execution  # type: ignore[assignment]
    return None if execution.state == "full precision" else integer_attention(module, plan, context)


def simulate_without_kernel(module: nn.Module) -> None:
    """Simulate the integer attention of a module, whose checkpoint comes from a machine that has the kernel."""
    site = module._modules.get(SITE)
    if isinstance(site, IntegerAttention) and (reason := attention_kernel(site.device).unsupported_reason):
        site.__class__ = QuantizedAttention  # type: ignore[assignment]
        module.execution = replace(module.execution, state="simulated", kernel="", compute="", reason=reason)  # type: ignore[assignment, type-var]


def integer_attention(module: nn.Module, plan: AttentionPlan, context: TimestepContext) -> IntegerAttention:
    """The integer attention of a module that a plan describes."""
    site = simulated_attention(module, plan, context)
    return IntegerAttention(site.query, site.key, site.value)


class _Recorded(ObservedAttention):
    """Keeps the arguments of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `torch.nn.functional.scaled_dot_product_attention`."""
        self.calls.append((args, kwargs))
        return super().forward(*args, **kwargs)


@torch.no_grad()
def time_attention(
    model: nn.Module,
    plans: Mapping[str, AttentionPlan],
    context: TimestepContext,
    timestep: float,
    example_inputs: Mapping[str, Any],
    *,
    rounds: int,
) -> dict[str, Timing]:
    """Time both forms of every attention that can run in integers; those alike once.

    Args:
        model: the full-precision denoiser; left as it is.
        plans: by module.
        context: of the plan's groups.
        timestep: to time at.
        example_inputs: keyword arguments of one call.
        rounds: see `compare_latency`.
    """
    timings: dict[str, Timing] = {}
    known: dict[Any, Timing] = {}
    for name, plan in plans.items():
        module = model.get_submodule(name)
        if not plan.quantized or attention_kernel(integer_attention(module, plan, context).device).unsupported_reason:
            continue
        recorded = _Recorded()
        with quantize_attention(module, recorded), uncompiled(model):
            model(**example_inputs)
        key = tuple(_layout(call) for call in recorded.calls)
        if recorded.calls and key not in known:
            known[key] = _time(module, plan, context, timestep, recorded.calls, rounds)
        if recorded.calls:
            timings[name] = known[key]
    return timings


def _layout(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    values = [*call[0], *call[1].values()]
    return tuple((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in values)


def _time(
    module: nn.Module, plan: AttentionPlan, context: TimestepContext, t: float, calls: Any, rounds: int
) -> Timing:
    site = integer_attention(module, plan, context)
    spent = {"integer": 0.0, "floating": 0.0}
    with context.select(t):
        for args, kwargs in calls:

            def integer(args: Any = args, kwargs: Any = kwargs) -> Tensor:
                with attending(site):  # as it runs: what routes a call takes time, too
                    return F.scaled_dot_product_attention(*args, **kwargs)

            def floating(args: Any = args, kwargs: Any = kwargs) -> Tensor:
                return F.scaled_dot_product_attention(*args, **kwargs)

            clock = thread_clock(site.device)
            forms = {"integer": integer, "floating": floating}
            for form, latency in compare_latency(
                forms, rounds=rounds, warmup=1, clock=clock, until_stable=True
            ).items():
                spent[form] += latency.low
    return Timing(**spent)
