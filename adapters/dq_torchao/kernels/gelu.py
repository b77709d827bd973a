"""GELU on a CPU, several times as fast as PyTorch's.

Transformers apply it to their widest activations. PyTorch computes a tanh or an erf in full precision there, which
takes as long as a third of the integer products of such a block. In eager mode a kernel of ours takes one pass over
memory. A compiler gets the same formulas in operations that it merges into the loop that quantizes the result, or,
in graphs for inference, an operator that becomes part of the product before it (`dq_torchao.kernels.merging`).

    tanh    y = x / (1 + exp(-2 u)),    u = sqrt(2 / pi) (x + 0.044715 x^3)
    none    y = max(x, 0) - |x| erfc(|x| / sqrt(2)) / 2

erfc by Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 7.1.26: absolute error 1.5e-7.

A module that calls ``torch.nn.functional.gelu`` in code of its own gets a class made on the fly, which opens a
`torch.overrides.TorchFunctionMode` while it runs, as attention does (`dq_plugins.quantized.attention`).
"""

from __future__ import annotations

from math import log, pi
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dq_plugins.lookalike import Lookalike, change_class, known_lookalike, lookalike
from dq_torchao.kernels import native
from dq_torchao.kernels.product import available
from dq_torchao.kernels.tracing import is_merged

CUBE, LARGEST, BEYOND = 0.044715, 126.0, 13.0
ERF_FACTOR, ERF = 0.3275911, (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
EXP2 = (
    1.3264727247032568e-3,
    9.6715126881474540e-3,
    5.5507337435743924e-2,
    0.24022242084635154,
    0.6931469775987153,
    1.0,
)
FEWEST = 1 << 14
"""Values below which PyTorch's is as fast."""


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """`torch.nn.functional.gelu`, the faster way where there is one: error 4e-7 or less, relative where |x| > 1."""
    if torch.compiler.is_compiling():
        takes = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.compiler.is_exporting()
        if takes and is_merged(x.device) and available():
            return torch.ops.dq_torchao.gelu(x, approximate)
        return _in_loops(x, approximate) if takes else F.gelu(x, approximate=approximate)
    if approximate not in ("none", "tanh") or not _fits(x):
        return F.gelu(x, approximate=approximate)
    return _one_pass(x, approximate)


torch.library.define("dq_torchao::gelu", "(Tensor x, str approximate) -> Tensor")
torch.library.register_fake("dq_torchao::gelu")(lambda x, approximate: torch.empty_like(x))


def _one_pass(x: Tensor, approximate: str) -> Tensor:
    y = torch.empty_like(x)
    x = x if x.stride() == y.stride() else torch.empty_like(x).copy_(x)
    native.library().dq_gelu(x.data_ptr(), y.data_ptr(), x.numel(), approximate == "tanh", torch.get_num_threads())
    return y


torch.library.impl("dq_torchao::gelu", "CPU")(_one_pass)


def _in_loops(x: Tensor, approximate: str) -> Tensor:
    if approximate == "tanh":
        t = x * (x * x * CUBE + 1.0) * (-2 * (2 / pi) ** 0.5 / log(2))
        return x / (1.0 + exp2(t.clamp(-LARGEST, LARGEST)))
    size = x.abs().clamp_max(BEYOND)
    t = 1.0 / (size * (ERF_FACTOR / 2**0.5) + 1.0)
    series = torch.full_like(t, ERF[0])
    for c in ERF[1:]:
        series = series * t + c
    return x.clamp_min(0.0) - 0.5 * size * series * t * exp2(size * size * (-0.5 / log(2)))


def exp2(t: Tensor) -> Tensor:
    """``2 ** t`` for \|t\| <= 126, relative error 2e-7, in operations that a compiler vectorises; see avx512.h."""
    whole = t.round()
    rest = t - whole
    y = torch.full_like(t, EXP2[0])
    for c in EXP2[1:]:
        y = y * rest + c
    return y * ((whole.to(torch.int32) + 127) << 23).view(torch.float32)  # the exponent of a float32


def _fits(x: Tensor) -> bool:
    if type(x) is not Tensor or x.dtype != torch.float32 or x.device.type != "cpu" or x.numel() < FEWEST:
        return False
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return dense and not (x.requires_grad and torch.is_grad_enabled()) and not native.why_not()


class _Replacing(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (gelu if function is F.gelu else function)(*args, **(kwargs or {}))


class WithGelu(Lookalike):
    """First base of the classes of modules that call GELU."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with `gelu` in the place of PyTorch's."""
        with _Replacing():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


def gelu_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``original`` that takes our `gelu`; always the same one."""
    return known_lookalike(original, gelu_class) or lookalike(original, WithGelu, gelu_class)


def take_gelu(model: nn.Module) -> list[str]:
    """Let the modules of ``model`` that call GELU take ours, in place; returns their names, none without a kernel."""
    found = [(name, module) for name, module in model.named_modules() if name and calls_gelu(type(module))]
    if not found or native.why_not():
        return []
    for _, module in found:
        change_class(module, gelu_class(type(module)))
    return [name for name, _ in found]


def calls_gelu(kind: type[nn.Module]) -> bool:
    """Whether a method of this class, or of one that it inherits from, names ``gelu``, as ``F.gelu(...)`` does."""
    if issubclass(kind, WithGelu):
        return False
    codes = (getattr(member, "__code__", None) for each in kind.__mro__ for member in vars(each).values())
    return any(isinstance(code, CodeType) and "gelu" in code.co_names and "forward" in dir(kind) for code in codes)
