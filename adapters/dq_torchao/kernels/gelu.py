"""GELU with the tanh approximation in eager mode on a CPU, several times as fast as PyTorch's.

Transformers apply it to their widest activations. PyTorch computes a tanh in full precision there, which takes as long
as a third of the integer products of such a block; a compiler merges it into the product before it, eager mode cannot.

A module that calls ``torch.nn.functional.gelu`` in code of its own gets a class made on the fly, which opens a
`torch.overrides.TorchFunctionMode` while it runs, as attention does (`dq_plugins.quantized.attention`).
"""

from __future__ import annotations

from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dq_plugins.lookalike import Lookalike, change_class, known_lookalike, lookalike
from dq_torchao.kernels import native

FEWEST = 1 << 14
"""Values below which PyTorch's is as fast."""


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """`torch.nn.functional.gelu`, by a kernel of ours where there is one: relative error 1e-6, as PyTorch's."""
    if approximate != "tanh" or not _fits(x):
        return F.gelu(x, approximate=approximate)
    y = torch.empty_like(x)
    native.library().dq_gelu(x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads())
    return y


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
        """As the original, with `gelu` in the place of PyTorch's; a compiler sees the original."""
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
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
