"""A Brevitas model on disk: ``model.safetensors`` with its state and what the state is for.

No pickle: Brevitas models cannot be pickled (their quantizers are classes made on the fly), and pickled files run code
when they are loaded. The quantizers themselves are code; loading needs a model quantized in the same way, either by the
script that made it or by `BrevitasAdapter` from the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dq_brevitas import host  # noqa: F401  isort: skip
from brevitas.graph.calibrate import load_quant_model_mode
from torch import Tensor, nn

from dq_brevitas.corrected import timestep_parts
from dq_brevitas.dynamic import dynamic_inputs
from dq_brevitas.weights import quantized_layers
from dq_plugins.artifact import STRICT, Format, StoredTensor
from dq_plugins.errors import DQError
from dq_plugins.full_precision import SAVE_FIRST, require_values
from dq_plugins.plan import DynamicActivationQuant
from dq_plugins.timesteps import TimestepContext, TimestepGroups, argument_of, attach_context, context_of

FILE_NAME = "model.safetensors"


@dataclass(frozen=True)
class ModelRecord:
    """The state of a model, and what it is for."""

    __pydantic_config__ = STRICT

    model: str
    timestep_argument: str | None
    out_of_range: Literal["error", "nearest"] | None
    groups: dict[str, TimestepGroups]
    widths: dict[str, dict[Literal["weight", "input"], int | None]]
    state: dict[str, StoredTensor]
    dynamic_inputs: dict[str, DynamicActivationQuant] | None = None  # which have no state


MODEL: Format[ModelRecord] = Format(
    "brevitas-model", 2, ModelRecord, DQError, "a Brevitas model", "Save the model again."
)


def _widths(model: nn.Module) -> dict[str, dict[Literal["weight", "input"], int | None]]:
    """Widths of every layer, which the state does not hold."""
    widths = {}
    for name, layer in quantized_layers(model).items():
        parts = {"weight": layer.weight_quant, "input": layer.input_quant}
        widths[name] = {k: int(p.bit_width()) if p.is_quant_enabled else None for k, p in parts.items()}
    return widths


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write the state of a Brevitas model, its widths and its timestep groups.

    The float copies that ``gptq_mode`` may have added (``weight_orig``) are left out: nothing computes with them.

    Args:
        model: a model quantized by Brevitas, with or without timestep groups.
        folder: made if it does not exist.

    Returns:
        The folder.

    Raises:
        DQError: an offloading tool holds the weights.
    """
    require_values(model, SAVE_FIRST, DQError)
    context = context_of(model)
    groups = {} if context is None else context.groups
    record = ModelRecord(
        model=type(model).__name__,
        timestep_argument=argument_of(model),
        out_of_range=context.out_of_range if context else None,
        groups=dict(groups),
        widths=_widths(model),
        state=_state(model),
        dynamic_inputs=dynamic_inputs(model) or None,
    )
    return MODEL.write(Path(folder) / FILE_NAME, record).parent


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load what `save` wrote into a model that was quantized in the same way, in place.

    Timestep groups are attached from the file; biases that bias correction added are created.

    Args:
        model: a model with the same quantizers: the quantization script's, or ``BrevitasAdapter().apply(model, plan)``.
        folder: where `save` wrote.

    Returns:
        ``model``.

    Raises:
        DQError: files missing or damaged, or the model is quantized in another way; the message names the layer.
    """
    record = MODEL.read(Path(folder) / FILE_NAME)
    context = TimestepContext(record.groups, record.out_of_range or "error")
    for proxy in timestep_parts(model).values():
        proxy.bind(context)
    _check_widths(record, model)
    if record.timestep_argument is not None:
        attach_context(model, context, record.timestep_argument)
    _check_finite(record.state, folder)
    try:
        with load_quant_model_mode(model):
            found = model.load_state_dict(record.state, strict=False)
    except RuntimeError as error:
        raise DQError(f"{folder} does not fit this model: {error}. Load the model it was saved from again.") from error
    missing = [k for k in found.missing_keys if not k.endswith(".weight_orig")]
    if missing or found.unexpected_keys:
        raise DQError(
            f"{folder} does not fit this model: missing {missing[:3]}, unexpected {found.unexpected_keys[:3]}. "
            "Quantize the model as it was quantized before saving."
        )
    return model


def _check_finite(state: Mapping[str, Tensor], folder: str | Path) -> None:
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
            raise DQError(f"{folder}: {name} holds NaN or infinity. The file is damaged; save the model again.")


def _state(model: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in model.state_dict().items() if not k.endswith(".weight_orig")}


def _check_widths(record: ModelRecord, model: nn.Module) -> None:
    have = _widths(model)
    for name, widths in record.widths.items():
        if name not in have:
            raise DQError(
                f"layer {name!r} was quantized when the model was saved and is not now; quantize the model as before, "
                "for example with BrevitasAdapter from its plan"
            )
        for part, saved in widths.items():
            found = have[name][part]
            if found != saved:
                raise DQError(f"the {part} of layer {name!r} was saved with {saved} bits; this model has {found}")
    before, now = record.dynamic_inputs or {}, dynamic_inputs(model)
    for name in record.widths:
        if before.get(name) != now.get(name):
            raise DQError(
                f"the input of layer {name!r} was saved with {_ranges(before.get(name))}; this model has "
                f"{_ranges(now.get(name))}"
            )


def _ranges(quant: DynamicActivationQuant | None) -> str:
    if quant is None:
        return "ranges that are calibrated"
    cut = f" cut off at {quant.clip:.3g} of the extremes" if quant.clip < 1 else ""
    return f"{'symmetric' if quant.symmetric else 'asymmetric'} dynamic ranges{cut}"
