"""Layers that the graph finds and that cannot be quantized where they stand: no quantizer would ever see their calls.

The graph knows ops and parameters. A quantizer needs more: a module that is called, with a weight of its own that can
be replaced. Modules that use the weight of another one (`torch.nn.MultiheadAttention` and its ``out_proj``), and
weights that are computed at each call (parametrizations), have an op in the graph and neither of the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from dq_plugins.compiled import evaluating, unwrap
from dq_plugins.hooks import hooked
from dq_plugins.layer_kinds import kind_of


def find_unsupported_layers(
    denoiser: nn.Module, example_inputs: Mapping[str, Any], layers: Iterable[str]
) -> dict[str, str]:
    """Why layers cannot be quantized, by layer; layers that can be are left out.

    Args:
        denoiser: with real weights; it is run once, without gradients, and left as it was.
        example_inputs: keyword arguments of one call.
        layers: fully qualified names, such as those of a partition.
    """
    denoiser = unwrap(denoiser)
    modules = {name: unwrap(denoiser.get_submodule(name)) for name in layers}
    reasons = {name: _no_own_weight(module) for name, module in modules.items()}
    values = _values(denoiser, example_inputs, {name: m for name, m in modules.items() if not reasons[name]})
    for name in modules:
        if not reasons[name] and name not in values:
            reasons[name] = "another module computes with its weight and never calls it: its inputs cannot be seen"
        elif not reasons[name] and not values[name]:
            reasons[name] = (
                "nothing reached it in the first call (an expert that no token chose): its inputs are not known"
            )
    return {name: reason for name, reason in reasons.items() if reason}


def _no_own_weight(module: nn.Module) -> str:
    weight = module._parameters.get("weight")
    if isinstance(weight, nn.Parameter) and (weight.dim() > 1 or kind_of(module) is not None):
        return ""  # one of a single dimension, of no layer of PyTorch's, is a row of factors: frequencies, mostly
    if nn.utils.parametrize.is_parametrized(module, "weight") or hasattr(module, "weight_g"):
        return (
            "its weight is computed at each call (a parametrization such as weight_norm); make it permanent, with "
            "torch.nn.utils.parametrize.remove_parametrizations, to have it quantized"
        )
    return f"{type(module).__name__} multiplies by parameters that are not a layer's weight"


def _values(denoiser: nn.Module, inputs: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """How many values each module that is called gets in one call of the denoiser."""
    seen: dict[str, int] = {}

    def count(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = (value.numel() for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        seen[name] = seen.get(name, 0) + next(found, 0)

    with hooked(modules, before=count), evaluating(denoiser):
        denoiser(**inputs)
    # A cache of diffusers would count this call as the first step of the next sampling run: told as pipelines tell it.
    getattr(denoiser, "_reset_stateful_cache", lambda: None)()
    return seen
