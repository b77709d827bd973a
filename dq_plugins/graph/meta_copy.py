"""A weightless copy of a denoiser: the same modules and code, every parameter and buffer replaced by a shape.

The original is only read. Hooks, compiled calls and forwards set on instances stay behind, so that the copy runs the
class's own code whatever a sampling library has attached to the original.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dq_plugins.errors import TraceError

Allocate = Callable[[Tensor], Tensor]
"""Makes the weightless stand-in of a tensor: same shape, strides and dtype, no data."""

# What nn.Module keeps on an instance for hooks, and what wrappers and compilers put on one.
_HOOKS = frozenset(key for key in vars(nn.Module()) if "_hooks" in key)
_LEFT_BEHIND = frozenset({"forward", "_compiled_call_impl"})


def empty_on(device: str) -> Allocate:
    """Allocator of stand-ins on a device that holds no data: ``"meta"``, or any device under a fake mode."""

    def allocate(tensor: Tensor) -> Tensor:
        # Tensor subclasses (quantized weights) stand in as the plain tensor they represent.
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    return allocate


def meta_copy(denoiser: nn.Module, allocate: Allocate) -> nn.Module:
    """Copy ``denoiser`` without its weights.

    Args:
        denoiser: on any device, the meta device included; left as it is.
        allocate: makes the stand-in of one parameter or buffer, see `empty_on`.

    Returns:
        The copy, in evaluation mode, no parameter requiring a gradient. Tied parameters stay tied, and a submodule
        wrapped by ``torch.compile`` is replaced by the module inside.

    Raises:
        TraceError: a parameter has no shape yet (lazy modules), or a module is a script module.
    """
    memo: dict[int, Any] = {}
    originals = dict(denoiser.named_modules())
    for name, module in originals.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"module {name or type(module).__name__!r} is a TorchScript module, whose code cannot be traced "
                "again. Build the denoiser from its Python class instead."
            )
        memo[id(module)] = object.__new__(type(module))
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _stand_in(f"{name}.{key}".lstrip("."), tensor, allocate)
    for module in originals.values():
        inner = vars(module).get("_modules", {}).get("_orig_mod")
        if inner is not None:
            memo[id(module)] = memo[id(inner)]
    for module in originals.values():
        if "_orig_mod" not in module._modules:
            _fill(memo[id(module)], module, memo, allocate)
    copied: nn.Module = memo[id(denoiser)]
    return copied.eval()


def _stand_in(name: str, tensor: Tensor, allocate: Allocate) -> Tensor:
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        raise TraceError(
            f"parameter {name!r} has no shape yet: it belongs to a lazy module. Run the denoiser once on real "
            "inputs, or give it its sizes, and trace it again."
        )
    empty = allocate(tensor)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _fill(copied: nn.Module, original: nn.Module, memo: dict[int, Any], allocate: Allocate) -> None:
    """Give the bare ``copied`` the attributes of ``original``, through ``memo`` so that references stay inside."""
    for key, value in vars(original).items():
        if key in _LEFT_BEHIND:
            continue
        if key in _HOOKS:
            value = _weight_hooks(value) if key == "_forward_pre_hooks" else type(value)()
        with _CopyPlainTensors(allocate):
            try:
                copied.__dict__[key] = copy.deepcopy(value, memo)
            except Exception:
                # Locks, files, generators: nothing that tracing changes, so the copy may share them.
                copied.__dict__[key] = value


def _weight_hooks(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    # those that compute a weight from its parameters (torch.nn.utils.weight_norm) are part of the model
    return OrderedDict((k, h) for k, h in hooks.items() if type(h).__module__.startswith("torch.nn.utils."))


class _CopyPlainTensors(TorchFunctionMode):
    """While it is active, ``copy.deepcopy`` of a plain tensor attribute gives a detached copy in host memory.

    Such tensors (position tables kept outside of buffers) are small, their values may steer the code, and
    ``Tensor.__deepcopy__`` refuses those that carry a gradient graph.
    """

    def __init__(self, allocate: Allocate) -> None:
        super().__init__()
        self.allocate = allocate

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            detached = tensor.detach()
            memo[id(tensor)] = self.allocate(detached) if tensor.is_meta else detached.cpu().clone()
        return memo[id(tensor)]
