"""Content hashes: what ties a plan or a calibration set to the weights and the data it was made from.

Every hash is sha256, as 64 hexadecimal digits. A tensor counts by its dtype, shape and values; not by its
device, strides or storage. Tensors are read one at a time, so the extra memory is that of the largest one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.errors import DQError


def hash_json(data: Any) -> str:
    """Hash of JSON data: equal for equal data, whatever the order of keys.

    Args:
        data: what ``json.dumps`` takes; tuples count as lists.

    Raises:
        DQError: the data has a part that JSON cannot hold (NaN and infinity among them), or is nested too deeply.
    """
    try:
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DQError(f"only finite JSON data can be hashed: {error}") from error
    # a surrogate alone is no character, and a JSON string may hold one
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def raw_bytes(tensor: Tensor) -> bytes | memoryview:
    """The values of a tensor in memory order, without a copy where it is on the host and contiguous."""
    plain = tensor.detach().cpu().contiguous()
    # One dimension of stride 1: a tensor of one element, expanded, has another stride and counts as contiguous.
    flat = plain.as_strided((plain.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def hash_tensor(tensor: Tensor) -> str:
    """Hash of one tensor: dtype, shape and values."""
    return hash_tensors({"": tensor})


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash of named tensors, whatever their order: names, dtypes, shapes and values.

    Raises:
        DQError: a tensor is on the meta device, so it has no values.
    """
    return hash_in_order(sorted(tensors.items()))


def weights_hash(module: nn.Module) -> str:
    """Hash of a module's weights: its parameters and persistent buffers, by name.

    Independent of the device, of ``torch.compile``, of hooks and of non-persistent buffers. A module whose
    class sets ``dq_quantizer_state = True`` is left out with everything below it, so attaching quantizers to
    a denoiser does not change its hash as long as the weights stay where they were.

    Raises:
        DQError: a weight is on the meta device, so it has no values.
    """
    module = getattr(module, "_orig_mod", module)
    own = [f"{name}." for name, child in module.named_modules() if getattr(child, "dq_quantizer_state", False)]
    state = module.state_dict()
    names = sorted(n for n, v in state.items() if isinstance(v, Tensor) and not n.startswith(tuple(own)))
    return hash_in_order((name, state[name]) for name in names)


def hash_in_order(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """`hash_tensors` of a stream, for tensors that are not in memory together; names must ascend."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        _feed(digest, name, tensor)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise DQError(
            f"tensor {name!r} is on the meta device and has no values; load the weights first, or take offloading off"
        )
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is not None:  # a wrapper subclass, such as torchao's: it counts by the plain tensors inside
        for part in parts()[0]:
            _feed(digest, f"{name}/{part}", getattr(tensor, part))
        return
    # The header's length is part of what is hashed, so no two sequences of tensors give the same bytes.
    header = json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
    digest.update(len(header).to_bytes(8, "little") + header)
    digest.update(raw_bytes(tensor))
