"""Attention whose two products are quantized: the definition, simulated, and how it takes the place of PyTorch's.

    s = q^ k^^T / sqrt(D) + mask          q^, k^, v^: quantized by the ranges of the call's timestep group
    p = round(255 exp(s - max s))         codes of the probabilities, 0 .. 255; the largest of a row is 255
    y = sum_n p_n v^_n / sum_n p_n

The probabilities are quantized before they are divided by their sum: a token that attends to a thousand others alike
would have nothing but zeros otherwise. Dividing by the sum of the codes, not of what was rounded, keeps y a weighted
mean of values, whatever rounding does. A row whose keys are all masked is 0.

A module (`attention_class`) hands its first call of ``scaled_dot_product_attention`` to its `QuantizedAttention` by a
`torch.overrides.TorchFunctionMode`, which is open while the module runs. It needs no name: any module that calls
PyTorch's function has it. Modes belong to the thread, an exception closes them, ``torch.compile`` and ``torch.export``
trace them away into one graph, and processors, dispatchers and hooks of other tools run as they are.

Shapes: ``B`` samples, ``H`` heads, ``L`` queries, ``S`` keys, ``D`` channels of a head.
Source: the scale of unnormalised probabilities is SageAttention's (Zhang et al. 2024, arXiv 2410.02367, section 4.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dq_plugins.compiled import evaluating, unwrap
from dq_plugins.errors import DQError
from dq_plugins.hooks import hooked
from dq_plugins.lookalike import Lookalike, change_class, known_lookalike, lookalike
from dq_plugins.plan import AttentionPlan
from dq_plugins.quantized.input_quantizers import ActivationQuantizer
from dq_plugins.quantized.straight_through import round_ste
from dq_plugins.timesteps import TimestepContext

SITE = "quantized_attention"
"""Attribute of a module whose attention is quantized."""

PROBABILITY_BITS = 8
"""Width of the codes of probabilities, which are not negative: 0 .. 255."""

DROPOUT = "quantized attention has no dropout: put the denoiser into evaluation mode, or leave its dropout at 0"


def site_name(module: str) -> str:
    """Name of a module's attention where it stands among layers: that of the attribute that holds it.

    No layer has this name, not even one that attends itself.
    """
    return ".".join(filter(None, (module, SITE)))


def attending_module(name: str) -> str | None:
    """The module whose attention has this name; None: it is the name of a layer."""
    module, _, last = name.rpartition(".")
    return module if last == SITE else None


class QuantizedAttention(nn.Module):
    """What a module's call of ``scaled_dot_product_attention`` runs instead, with the same arguments.

    Attributes:
        query: what the query passes through, from tensor to tensor: its quantizer.
        key: likewise.
        value: likewise.
    """

    dq_quantizer_state = True  # no weights of the denoiser: left out of its hash

    def __init__(self, query: nn.Module, key: nn.Module, value: nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.value = query, key, value

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """See `torch.nn.functional.scaled_dot_product_attention`."""
        if dropout_p > 0:
            raise DQError(DROPOUT)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return self.attend(query, key, value, attn_mask, is_causal, scale)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
    ) -> Tensor:
        """Attention of ``query [..., L, D]`` to ``key [..., S, D]`` and ``value [..., S, D']``, simulated.

        Args:
            query: floating point.
            key: likewise; of as many heads as the query, or of a divisor of it.
            value: likewise.
            mask: what is added to the scores, or where they count (bool); it broadcasts against ``[..., L, S]``.
            is_causal: whether a query sees the keys up to its own position, instead of a mask.
            scale: of the scores.
        """
        mask = full_mask(query, key, mask, is_causal)
        q, k, v = self.query(query), self.key(key), self.value(value)
        if k.dim() > 2 and k.shape[-3] != q.shape[-3]:  # heads that share a key and a value
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        return attention_of_codes(q, k, v, mask, scale).to(query.dtype)


def attention_of_codes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The definition of quantized attention, after query, key and value were quantized; float32 ``[..., L, D']``."""
    scores = query.float() @ key.float().mT * scale  # [..., L, S]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    largest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)  # of masked rows: not -inf
    codes = round_ste((2**PROBABILITY_BITS - 1) * torch.exp(scores - largest))
    return (codes @ value.float()) / codes.sum(-1, keepdim=True).clamp_min(1)


def full_mask(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """``mask``, or that of causal attention ``[L, S]``: a query sees the keys up to its own position."""
    if not is_causal:
        return mask
    if mask is not None:
        raise DQError("attention is causal or has a mask, not both")
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()


class ObservedAttention(QuantizedAttention):
    """PyTorch's own, with its operands passing through modules that leave them as they are."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), nn.Identity(), nn.Identity())

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See `torch.nn.functional.scaled_dot_product_attention`."""
        return F.scaled_dot_product_attention(self.query(query), self.key(key), self.value(value), *args, **kwargs)


class attending(TorchFunctionMode):  # noqa: N801  # for a with statement
    """While it is open, the first attention runs as ``site`` says."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.site: nn.Module | None = site

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention and self.site is not None:
            function, self.site = self.site, None
        elif function is Tensor.unflatten:  # its super() has no meaning to a compiler that comes from here
            function = torch.unflatten
        return function(*args, **(kwargs or {}))


class Attending(Lookalike):
    """First base of the classes of modules whose attention is quantized."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with its `QuantizedAttention` in the place of PyTorch's."""
        site = self.__dict__["_modules"].get(SITE)
        if site is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with attending(site):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


def attention_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``original`` that looks for its `QuantizedAttention`; always the same one."""
    return known_lookalike(original, attention_class) or lookalike(original, Attending, attention_class)


def quantize_attention(module: nn.Module, site: QuantizedAttention) -> ExitStack:
    """Give the attention of a module another form: for good, or for the length of a ``with`` block.

    Args:
        module: it calls ``scaled_dot_product_attention`` in its forward.
        site: what runs instead.

    Returns:
        What makes the module as it was when it is closed.
    """
    original, stack = type(module), ExitStack()
    change_class(module, attention_class(original))
    stack.callback(change_class, module, original)
    module.add_module(SITE, site)
    stack.callback(module._modules.pop, SITE)
    return stack


class SwitchedAttention:
    """Puts the attention of a module into one form after another.

    Args:
        module: it calls ``scaled_dot_product_attention`` in its forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self._quantized = module, ExitStack()

    def use(self, site: QuantizedAttention | None) -> None:
        """Attend by ``site`` from now on; None: as PyTorch does, the module being exactly as it was found."""
        self._quantized.close()
        self._quantized = ExitStack() if site is None else quantize_attention(self.module, site)


def simulated_attention(module: nn.Module, plan: AttentionPlan, context: TimestepContext) -> QuantizedAttention:
    """The simulated attention of a module that a plan describes."""
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    return QuantizedAttention(
        **{n: ActivationQuantizer(q, context, device, rows=plan.rows) for n, q in plan.quantizers.items()}
    )


MakeSite = Callable[[str, nn.Module, AttentionPlan, TimestepContext], QuantizedAttention | None]
"""Makes a backend's form of the attention of a module, given its name, too; None: it stays PyTorch's."""


def install_attention(
    model: nn.Module, plans: Mapping[str, AttentionPlan], context: TimestepContext, make: MakeSite | None = None
) -> ExitStack:
    """Quantize the attention of a denoiser as planned: for good, or for the length of a ``with`` block.

    Args:
        model: the denoiser.
        plans: by the name of the module that attends.
        context: of the denoiser.
        make: makes it; simulated by default.

    Returns:
        What makes the modules as they were when it is closed.
    """
    stack = ExitStack()
    for name, plan in plans.items():
        if not plan.quantized:
            continue
        module = model.get_submodule(name)
        site = make(name, module, plan, context) if make else simulated_attention(module, plan, context)
        if site is not None:
            stack.enter_context(quantize_attention(module, site))
    return stack


class _Counting(TorchFunctionMode):
    """Counts, while it is open, how often each module attends in one of its calls."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.modules = dict(denoiser.named_modules())
        self.running: list[list[Any]] = []  # name and count of every module that is being called
        self.most: dict[str, int] = {}

    def enter(self, name: str, *_: Any) -> None:
        self.running.append([name, 0])

    def leave(self, *_: Any) -> None:
        self.running.pop()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attends = function is F.scaled_dot_product_attention
        if self.running and (attends or function is F.multi_head_attention_forward):
            module = self.running[-1]
            module[1] += attends
            self.most[module[0]] = max(self.most.get(module[0], 0), module[1])
        return function(*args, **(kwargs or {}))


def attention_calls(denoiser: nn.Module, example_inputs: Mapping[str, Any]) -> dict[str, int]:
    """The modules that attend in a call of a denoiser, with how often each does in one call of its own.

    Args:
        denoiser: the denoiser; left as it is.
        example_inputs: keyword arguments of the call.

    Returns:
        In order of their first call. 0: by ``multi_head_attention_forward``, inside which nothing can take its place.
    """
    denoiser = unwrap(denoiser)
    counting = _Counting(denoiser)
    with hooked(counting.modules, before=counting.enter, after=counting.leave), evaluating(denoiser), counting:
        denoiser(**example_inputs)
    return counting.most
