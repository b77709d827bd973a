"""Size of a model as its checkpoint holds it."""

from __future__ import annotations

from torch import Tensor, nn


def _inner_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; of a tensor subclass, those of the tensors it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_inner_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def state_bytes(module: nn.Module) -> int:
    """Bytes of the module's parameters and persistent buffers; tied weights count once."""
    seen: dict[int, int] = {}
    for value in module.state_dict(keep_vars=True).values():
        if isinstance(value, Tensor):
            seen[id(value)] = _inner_bytes(value)
    return sum(seen.values())
