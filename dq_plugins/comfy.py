"""A plan's widths and rounding as the int8 safetensors file that ComfyUI reads.

For each linear layer in integers ComfyUI looks for

    NAME.weight        int8 [O, C]
    NAME.weight_scale  float32 [O, 1]         w = weight_scale * weight
    NAME.comfy_quant   uint8: JSON, {"format": "int8_tensorwise"}

and quantizes the layer's input itself, each row by its own maximum: ranges of a plan have no place in this layout, nor
have zero points, transformed inputs and corrections that depend on the timestep. A layer that needs one of these, and
one that is not linear, is written as the floating-point values that its quantized weight stands for.

Source: QUANTIZATION.md and comfy/quant_ops.py of ComfyUI; ``TensorWiseINT8Layout`` of the package comfy-kitchen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dq_plugins.atomic import replacing
from dq_plugins.compiled import unwrap
from dq_plugins.full_precision import require_full_precision
from dq_plugins.layer_kinds import kind_of
from dq_plugins.plan import LayerPlan, QuantPlan
from dq_plugins.quantized.layer_transform import fake_weight, transform_of

FORMAT = "int8_tensorwise"
"""ComfyUI's name of int8 weights with a scale for each tensor or output."""


@torch.no_grad()
def write_comfy(denoiser: nn.Module, plan: QuantPlan, file: str | Path, *, prefix: str = "") -> dict[str, str]:
    """Write a denoiser with the plan's weights.

    Args:
        denoiser: the full-precision denoiser that the plan was made for.
        plan: the plan.
        file: to write.
        prefix: of every key; ``"model.diffusion_model."`` where a checkpoint holds more than a denoiser. Keys are the
            names of this denoiser: ComfyUI has to know the architecture by them.

    Returns:
        Layers whose weights the plan quantizes and that are written in floating point: why, by name.

    Raises:
        PlanError: the plan is of another model, or this one is quantized already.
    """
    require_full_precision(denoiser)
    denoiser = unwrap(denoiser)
    plan.check_model(denoiser)
    state = {name: value.detach().cpu() for name, value in denoiser.state_dict().items()}
    left = {}
    for name, layer in plan.layers.items():
        if layer.weight is None:
            continue
        module = denoiser.get_submodule(name)
        why = _obstacle(module, layer)
        state |= _floating(name, module, state, layer) if why else _integer(name, state, layer)
        if why:
            left[name] = why
    # tied tensors have one place in memory, and the format wants one for each
    tensors = {prefix + name: value.clone().contiguous() for name, value in state.items()}
    with replacing(Path(file)) as scratch:
        safetensors.torch.save_file(tensors, scratch, metadata={"format": "pt"})
    return left


def _obstacle(layer: Any, plan: LayerPlan) -> str:
    """Why a layer cannot be in integers in this layout; empty if it can."""
    kind, weight = kind_of(layer), plan.weight
    assert weight is not None
    if kind is None or kind.name != "linear":
        return f"ComfyUI runs linear layers alone in integers, this is {plan.kind}"
    if weight.zero_point is not None:
        return "its weight has zero points (symmetric_weights=True makes a plan without)"
    if weight.bits > 8:
        return f"its weight has {weight.bits} bits"
    if weight.group_scale is not None:
        return "its weight has scales for groups of inputs"
    if transform_of(plan) is not None:
        return "its input is transformed (recipes without channel-balance, rotation and low-rank make a plan without)"
    return ""


def _integer(name: str, state: dict[str, Tensor], plan: LayerPlan) -> dict[str, Tensor]:
    assert plan.weight is not None
    weight = state[f"{name}.weight"]
    config = torch.tensor(list(json.dumps({"format": FORMAT}).encode()), dtype=torch.uint8)
    return {
        f"{name}.weight": plan.weight.quantize(weight).cpu(),
        f"{name}.weight_scale": plan.weight.scale.float().cpu().expand(len(weight)).reshape(-1, 1),
        f"{name}.comfy_quant": config,
        **_bias(name, state, plan),
    }


def _floating(name: str, layer: nn.Module, state: dict[str, Tensor], plan: LayerPlan) -> dict[str, Tensor]:
    assert plan.weight is not None
    rounded = fake_weight(layer, plan.weight, transform_of(plan))
    return {f"{name}.weight": rounded.to(state[f"{name}.weight"].dtype).cpu(), **_bias(name, state, plan)}


def _bias(name: str, state: dict[str, Tensor], plan: LayerPlan) -> dict[str, Tensor]:
    """The bias, with a correction that is the same at every timestep."""
    correction, bias = plan.bias_correction, state.get(f"{name}.bias")
    if correction is None or len(correction.values) > 1 or bias is None:
        return {}
    return {f"{name}.bias": (bias.float() + correction.values[0].cpu()).to(bias.dtype)}
