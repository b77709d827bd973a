"""The full-precision denoiser inside a Brevitas model."""

from __future__ import annotations

import copy
import inspect

from dq_brevitas import host  # noqa: F401  isort: skip
import brevitas.nn as qnn
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from torch import nn

from dq_brevitas.weights import quantized_layers
from dq_plugins.errors import DQError
from dq_plugins.layer_kinds import LAYER_KINDS, LayerKind, kind_of
from dq_plugins.quantized.table_lookup import NotComputed, TableLookup
from dq_plugins.timesteps import detach_context

QUANT_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    kind.module: getattr(qnn, f"Quant{kind.module.__name__}") for kind in LAYER_KINDS.values() if not kind.lookup
}
"""Brevitas layer that replaces a PyTorch layer; a subclass of it."""


def plain_kind(name: str, layer: nn.Module) -> LayerKind:
    """The kind of a Brevitas layer.

    Raises:
        DQError: the layer has no full-precision counterpart.
    """
    kind = kind_of(layer)
    if kind is None:
        raise DQError(f"layer {name!r} is a {type(layer).__name__}, which has no full-precision counterpart")
    return kind


def float_model(model: nn.Module, original: nn.Module | None = None) -> nn.Module:
    """A full-precision copy of a Brevitas model: the denoiser as trained, without its quantizers.

    Weights are the float weights behind the quantizers, biases include bias correction. It is the denoiser that a plan
    read by `plan_from_model` belongs to, and what the plan can be applied to with any backend.

    Args:
        model: a denoiser quantized by layers (``layerwise_quantize``, a layer map, or `BrevitasAdapter`).
        original: the denoiser it was made from; needed where a temporal table has replaced layers.

    Returns:
        The copy, with plain PyTorch layers and no timestep context.

    Raises:
        DQError: a quantized layer has no full-precision counterpart, or layers are gone and ``original`` is not given.
    """
    plain = copy.deepcopy(model)
    detach_context(plain)
    _restore_temporal(plain, original)
    for name, layer in quantized_layers(plain).items():
        plain.set_submodule(name, _plain_layer(plain_kind(name, layer).module, layer))
    for name, module in plain.named_modules():
        if isinstance(module, QuantProxyFromInjector) and module.is_quant_enabled:
            raise DQError(
                f"quantizer {name!r} is not part of a layer with a weight, so a full-precision copy without it would "
                "be another model; quantize layer inputs (input_quant) instead of inserting activation quantizers"
            )
    return plain


def _restore_temporal(plain: nn.Module, original: nn.Module | None) -> None:
    for name, module in list(plain.named_modules()):
        if not isinstance(module, TableLookup | NotComputed):
            continue
        if original is None:
            raise DQError(
                f"layer {name!r} was replaced by the temporal table and its weights are not in the model any more; "
                "pass the denoiser the plan was made for as original=..."
            )
        plain.set_submodule(name, copy.deepcopy(original.get_submodule(name)))


def _plain_layer(plain: type[nn.Module], layer: nn.Module) -> nn.Module:
    names = set(inspect.signature(plain).parameters) - {"bias", "device", "dtype"}
    bare = plain(**{name: getattr(layer, name) for name in names}, bias=layer.bias is not None, device="meta")
    bare.weight = nn.Parameter(layer.weight.detach(), layer.weight.requires_grad)
    if layer.bias is not None:
        bare.bias = nn.Parameter(layer.bias.detach(), layer.bias.requires_grad)
    return bare.train(layer.training)
