"""What every entry point expects of the denoiser that it is handed: a module, in full precision."""

from __future__ import annotations

from typing import Any

from torch import nn

from dq_plugins.errors import CalibrationError, DQError, PlanError
from dq_plugins.timesteps import context_of

QUANTIZERS = frozenset(
    {"bitsandbytes", "brevitas", "hqq", "modelopt", "nncf", "nunchaku", "optimum", "quanto", "sdnq", "torchao"}
)
"""Packages whose layers and tensors are quantized ones. So are those of ``torch.ao``, and of modules that are named
``quantizers``."""

MARKS = ("is_loaded_in_4bit", "is_loaded_in_8bit", "qweight", "W_q", "SCB", "quant_state")
"""Attributes that other tools leave on what they quantized, whatever its class: flags, codes, scales."""


def require_module(denoiser: Any) -> None:
    """Raise `DQError` unless ``denoiser`` is a module; a pipeline, which holds one, is the usual mistake."""
    if isinstance(denoiser, nn.Module):
        return
    found = getattr(denoiser, "components", None)
    parts = [n for n, part in found.items() if isinstance(part, nn.Module)] if isinstance(found, dict) else []
    hint = f" Of its modules ({', '.join(parts)}), pass the one that sampling calls once a step." if parts else ""
    raise DQError(f"a denoiser is a torch.nn.Module, and this is a {type(denoiser).__name__}.{hint}")


QUANTIZE_FIRST = (
    "Quantize first and offload then; pipe.remove_all_hooks() takes accelerate's off. Offloading by whole models, and "
    "by groups in memory, may be on before."
)
SAVE_FIRST = (
    "Save first and offload then; pipe.remove_all_hooks() takes accelerate's off. Offloading by whole models, and by "
    "groups in memory, may be on."
)


def require_values(denoiser: nn.Module, advice: str = QUANTIZE_FIRST, error: type[DQError] = PlanError) -> None:
    """Raise where an offloading tool keeps the weights of a denoiser elsewhere while it does not run.

    Args:
        denoiser: looked at with its hooks.
        advice: what to do, the end of the message.
        error: its class.
    """
    for name, module in denoiser.named_modules():
        meta = any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
        on_disk = any(getattr(getattr(hook, "group", None), "offload_to_disk_path", None) for hook in hooks)
        if (meta and hasattr(module, "_hf_hook")) or on_disk:
            how = "group offloading to disk" if on_disk else "sequential offloading (a hook of accelerate)"
            raise error(
                f"the weights of this {type(denoiser).__name__} are not in memory: {how} holds those of "
                f"{name or 'the denoiser'!r}. {advice}"
            )


def require_uncached(denoiser: Any) -> None:
    """Raise `CalibrationError` where a cache of diffusers leaves parts of the denoiser out.

    Passes repeat recorded calls one by one and in any order, and a cache answers from the call before.
    """
    if getattr(denoiser, "is_cache_enabled", False):
        raise CalibrationError(
            f"a cache is enabled on this {type(denoiser).__name__}, which answers a call from the calls before it, so "
            "recorded calls cannot be repeated one by one. Call disable_cache() to record and plan, or calibrate by "
            "sampling under the cache: quantize_(denoiser, TimestepInt8Config(step='prepare')), sample, 'convert'"
        )


def quantized_by(denoiser: nn.Module) -> str:
    """What shows that a denoiser is quantized already, as a clause; empty where nothing does."""
    if context_of(denoiser) is not None:
        return "a plan, or the calibration for one, is applied to it"
    for name, module in denoiser.named_modules():
        for part in (module, *module.parameters(recurse=False)):
            package, *inside = type(part).__module__.split(".")
            if package in QUANTIZERS or "quantizers" in inside or (package, *inside[:1]) == ("torch", "ao"):
                return f"{name!r} is or holds a {type(part).__module__}.{type(part).__name__}"
            for mark in MARKS:
                if (value := getattr(part, mark, None)) is not None and value is not False:
                    return f"{name or 'the denoiser'!r} is or holds a {type(part).__name__} with an attribute {mark!r}"
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and not (weight.is_floating_point() or weight.is_complex()):
            return f"the weight of {name!r} holds {str(weight.dtype).removeprefix('torch.')} numbers"
    return ""


def require_full_precision(denoiser: Any) -> None:
    """Raise `PlanError` unless ``denoiser`` is a module and nothing shows that it is quantized."""
    require_module(denoiser)
    require_values(denoiser)
    evidence = quantized_by(denoiser)
    if evidence:
        raise PlanError(
            f"this {type(denoiser).__name__} is quantized already: {evidence}. Plans are made from, and applied to, "
            "the full-precision denoiser; load it again, or keep a copy."
        )
