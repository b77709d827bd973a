"""A user's LoRA adapters (peft) as part of the low-rank branches of a quantized denoiser.

An adapter beside a quantized layer is two thin products, as a low-rank branch is. Merged, both are one branch:

    y = Q(x) Q(w')^T + x (up down)^T + s x (B A)^T      =      Q(x) Q(w')^T + x ([up, s B] [down; A])^T

The quantized weight stays as it is, so nothing is rounded again, and the denoiser is saved and loaded as any other.

Shapes: ``r`` rank, ``K`` products per output, ``O`` outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.compiled import unwrap
from dq_plugins.errors import DQError
from dq_plugins.libraries import library_adapter
from dq_plugins.plan import LowRank
from dq_plugins.plan.low_rank import scaled_down
from dq_torchao.checkpoint_config import CheckpointConfig, checkpoint_config_of, remember
from dq_torchao.packed_weight import PackedWeight


@torch.no_grad()
def merge_lora(denoiser: nn.Module) -> int:
    """Merge the active LoRA adapters of a quantized denoiser, in place.

    Beside quantized weights they become part of the low-rank branch, in float16; elsewhere they go into the weight.
    They cannot be taken out again.

    Args:
        denoiser: quantized by `dq_torchao.apply`, with adapters of peft (``pipe.load_lora_weights``) at the scales
            that they are to have (``set_adapters``).

    Returns:
        Number of layers that had an adapter.

    Raises:
        DQError: it is not quantized, has no adapter or one that is not active, or one that is no plain LoRA, or on a
            layer that takes no branch; nothing is changed.

    Example::

        pipe.load_lora_weights("style.safetensors")
        dq_torchao.merge_lora(pipe.unet)
    """
    denoiser = unwrap(denoiser)
    config = checkpoint_config_of(denoiser)
    if config is None:
        raise DQError(f"this {type(denoiser).__name__} is not quantized; use fuse_lora")
    adapted = dict(_adapted(denoiser))
    if not adapted:
        raise DQError(f"this {type(denoiser).__name__} has no LoRA adapter, or its adapters are merged already")
    branches = {name: _merged(name, module) for name, module in adapted.items()}  # everything is checked before
    plan = config.skeleton(denoiser)
    for name, module in adapted.items():
        base, branch = module.get_base_layer(), branches[name]
        if branch is None:
            module.merge(safe_merge=True, adapter_names=module.active_adapters)
        else:
            _hold(base, branch)
            plan.layer(name).low_rank = branch
        denoiser.set_submodule(name, base)
    vars(denoiser).pop("peft_config", None)  # peft's own note of what it has added
    forget = getattr(library_adapter(denoiser), "forget_adapters", None)
    if forget is not None:
        forget(denoiser)
    remember(denoiser, CheckpointConfig.of(denoiser, plan, config.options))
    return len(adapted)


def _adapted(denoiser: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers with an adapter, by the name that they had without one."""
    for name, module in denoiser.named_modules():
        if callable(getattr(module, "get_base_layer", None)) and hasattr(module, "active_adapters"):
            yield name, module


def _merged(name: str, module: Any) -> LowRank | None:
    """The branch of a layer with its adapters in it; None for a layer whose weight takes them."""
    base, known = module.get_base_layer(), list(getattr(module, "lora_A", {}))
    if not known or any(getattr(module, "lora_variant", {}).get(each) is not None for each in known):
        raise DQError(f"the adapter of layer {name!r} is no plain LoRA, so it stays beside the quantized layer")
    if idle := [each for each in known if each not in module.active_adapters or module.disable_adapters]:
        raise DQError(
            f"adapter {idle[0]!r} of layer {name!r} is not active: delete it (delete_adapters), or activate it "
            "(set_adapters), before adapters are merged"
        )
    if not isinstance(base, PackedWeight):
        return None
    kind = base._kind
    if kind.lookup or kind.output_axis != 0 or getattr(base, "groups", 1) > 1:
        raise DQError(f"layer {name!r} is a {type(base).__name__}, which takes no low-rank branch")
    if any(getattr(module.lora_B[each], "bias", None) is not None for each in known):
        raise DQError(f"the adapter of layer {name!r} has a bias of its own, for which a branch has no place")
    downs = [module.lora_A[each].weight.float().flatten(1) for each in known]  # [r, K]
    ups = [module.lora_B[each].weight.float().flatten(1) * module.scaling[each] for each in known]  # [O, r]
    own = base.low_rank
    if own is not None:
        downs.insert(0, scaled_down(own.down, own.scale, torch.float32, own.down.device))
        ups.insert(0, own.up.float())
    return _in_float16(name, torch.cat(downs), torch.cat(ups, 1))


def _in_float16(name: str, down: Tensor, up: Tensor) -> LowRank:
    """A branch whose two matrices are alike in size, direction by direction: float16 is narrow."""
    size = (up.abs().amax(0).clamp_min(1e-30) / down.abs().amax(1).clamp_min(1e-30)).sqrt()
    size = size.clamp(1e-3, 1e3)  # an empty direction stays empty
    down, up = (down * size[:, None]).half(), (up / size).half()
    if not bool(torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise DQError(f"the adapter of layer {name!r} is too large for a branch in float16")
    return LowRank(down, up)


def _hold(layer: PackedWeight, branch: LowRank) -> None:
    layer.low_rank_down, layer.low_rank_up, layer.low_rank_scale = branch.down, branch.up, None
    if layer._modules.get("input_quantizer") is not None:  # simulated: the branch meets the input as it comes
        layer.input_beside = "whole"  # type: ignore[assignment]
