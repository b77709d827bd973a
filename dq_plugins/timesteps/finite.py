"""NaN and infinity among the arguments of a quantized denoiser: they come out as NaN, or raise, as numbers never.

A quantizer has no code for them. Integers made of a NaN are anything, and infinity is clipped to the end of the range:
what came out would look like an image. So the arguments are looked at where the call is routed, once for all layers and
backends, and what was computed from such a sample is replaced by NaN, as full precision would have had it. Minus
infinity is what masks are made of, and stays allowed in arguments that are named so.

Shapes: ``B`` samples of the call.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dq_plugins.errors import DQError

NonFinite = Literal["nan", "error"]
"""What NaN or infinity among the arguments of a call does: gives NaN for that sample, or raises."""

REFUSED = (
    "the denoiser was called with {name} that holds NaN or infinity, for which a quantizer has no code. Look for where "
    "it comes from (half precision overflows, a step that is too large), or apply the plan with non_finite='nan'"
)


def guarded(
    compute: Callable[..., Any],
    names: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    non_finite: NonFinite,
) -> Any:
    """``compute(*args, **kwargs)``, with NaN for samples whose arguments are not finite.

    Args:
        compute: the forward of a denoiser.
        names: of its positional arguments, as far as they are known.
        args: positional arguments; the sample is the first floating-point tensor among all.
        kwargs: the others.
        non_finite: what to do.

    Raises:
        DQError: an argument is not finite, and ``non_finite`` is ``"error"``.
    """
    named = [(names[i] if i < len(names) else str(i), value) for i, value in enumerate(args)]
    leaves = [leaf for name, value in (*named, *kwargs.items()) for leaf in _leaves(name, value)]
    if non_finite == "error":
        for name, tensor in leaves:
            _refuse(name, tensor)
        return compute(*args, **kwargs)
    samples = next((tensor.shape[0] for _, tensor in leaves if tensor.dim() > 1), None)
    suspects = [(name, tensor) for name, tensor in leaves if not _readable(tensor) or _is_bad(name, tensor)]
    bad = _bad_samples(suspects, samples)  # before the call, which may change its arguments in place
    output = compute(*args, **kwargs)
    return output if bad is None else _with_nan(output, bad)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.element_size() > 1 and value.numel():
            yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(f"{name}.{key}", each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(name, each)


def _readable(tensor: Tensor) -> bool:
    """Whether values may be looked at without waiting for a device, outside of graphs and transformations."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    return plain and not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def _is_bad(name: str, tensor: Tensor) -> bool:
    low, high = (float(value) for value in tensor.detach().aminmax())  # NaN if one value is
    return not (math.isfinite(high) and (math.isfinite(low) or ("mask" in name and low == -math.inf)))


def _bad_values(name: str, tensor: Tensor) -> Tensor:
    bad = ~torch.isfinite(tensor.detach())
    return bad & (tensor.detach() != -math.inf) if "mask" in name else bad


def _bad_samples(leaves: Sequence[tuple[str, Tensor]], samples: int | None) -> Tensor | None:
    """Whether something belongs to each sample that is not finite, ``[B]``, or to the call as a whole, ``[]``."""
    found: Tensor | None = None
    for name, tensor in leaves:
        bad = _bad_values(name, tensor)
        own = samples is not None and tensor.dim() > 0 and tensor.shape[0] == samples
        bad = bad.reshape(tensor.shape[0], -1).any(1) if own else bad.any()
        found = bad if found is None else found | bad.to(found.device)
    return found


def _with_nan(output: Any, bad: Tensor) -> Any:
    """An output with NaN for the bad samples, of the same kind."""
    if isinstance(output, Tensor):
        if not output.is_floating_point():
            return output
        bad = bad.to(output.device)
        own = bad.dim() == 1 and output.dim() > 0 and output.shape[0] == bad.shape[0]
        where = bad.reshape(-1, *[1] * (output.dim() - 1)) if own else bad.any()
        return output.masked_fill(where, math.nan)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        return type(output)(**{name: _with_nan(value, bad) for name, value in fields.items()})
    if isinstance(output, Mapping):
        return {name: _with_nan(value, bad) for name, value in output.items()}
    if isinstance(output, list | tuple):
        items = [_with_nan(value, bad) for value in output]
        if isinstance(output, list):
            return items
        return type(output)(*items) if hasattr(output, "_fields") else tuple(items)
    return output


def _refuse(name: str, tensor: Tensor) -> None:
    if torch.compiler.is_compiling():
        torch._assert_async(~_bad_values(name, tensor).any(), REFUSED.format(name=name))
    elif _is_bad(name, tensor):
        raise DQError(REFUSED.format(name=name))
