"""Quantized denoisers on disk: one safetensors file with tensors and config, for any ``nn.Module``.

Loading takes the denoiser's own class for everything that is not quantized: build it as you built it before, with any
weights or none, and `load` gives it the quantized layers and all values. Nothing is measured or decided again, so the
loaded denoiser computes the same bits. A library that saves models in a form of its own is served by its adapter
(`dq_torchao.checkpoint_config.remember`), from the same parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torchao.core.config import config_to_dict

from dq_plugins.artifact.files import check_place
from dq_plugins.atomic import replacing
from dq_plugins.errors import CheckpointError, DQError, PlanError, TimestepError
from dq_plugins.full_precision import SAVE_FIRST, require_values
from dq_plugins.quantized.attention import QuantizedAttention
from dq_plugins.timesteps import TimestepContext
from dq_torchao.adapter import install
from dq_torchao.attention import restore_attention
from dq_torchao.checkpoint_config import CheckpointConfig, checkpoint_config_of, remember, require_unreplaced
from dq_torchao.checkpoint_files import CheckpointFiles, integrity_metadata
from dq_torchao.config_data import config_from_json
from dq_torchao.restoring import check_values, restore_layer
from dq_torchao.timestep_state import bind_timestep_state

FILE_NAME = "model.safetensors"


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write a quantized denoiser.

    Args:
        model: quantized by `dq_torchao.apply`, ``dq_plugins.apply(..., backend="torchao")`` or ``quantize_``.
        folder: made if it does not exist.

    Returns:
        The folder.

    Raises:
        DQError: ``model`` is not quantized, an offloading tool holds its weights, or quantized layers were replaced.
    """
    config = checkpoint_config_of(model)
    if config is None:
        raise DQError(
            f"this {type(model).__name__} was not quantized by dq_torchao, so there is nothing to save that torch does "
            "not save: apply a plan to it first, or save its state_dict with safetensors"
        )
    require_values(model, SAVE_FIRST, DQError)
    require_unreplaced(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    with replacing(folder / FILE_NAME) as temporary:
        safetensors.torch.save_file(state, temporary, integrity_metadata(state, config_to_dict(config), carried=True))
    return folder


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load what `save` wrote, in place.

    Args:
        model: a full-precision denoiser of the same class and size; its weights do not matter.
        folder: what `save` was given.

    Returns:
        ``model``, quantized as it was when saved, on the device it is on.

    Raises:
        CheckpointError: files missing, truncated, damaged, altered, or of another model.
        DQError: the checkpoint is of a newer dq-plugins.
    """
    folder = Path(folder)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    if (folder / FILE_NAME).exists():  # `CheckpointFiles` says what is missing
        with _damage_named():
            check_place(folder / FILE_NAME)
    files = CheckpointFiles([folder / FILE_NAME])
    raw = files.record.config
    if raw is None:
        raise CheckpointError(
            f"{files.files[0]} does not hold its quantization config: another library saved the denoiser, and its own "
            "from_pretrained loads it"
        )
    files.verify(raw)
    config = config_from_json(raw, CheckpointConfig)
    rebuild(model, config, files.entries)
    files.check(model.state_dict())
    with _damage_named():
        model.load_state_dict(dict(files.tensors()), assign=True)
    return finish(model.to(device).eval(), config)


def rebuild(model: nn.Module, config: CheckpointConfig, stored: Iterable[str]) -> nn.Module:
    """Give a full-precision denoiser the structure of a quantized one, in place; the values are still to be loaded.

    What will be loaded is on the meta device afterwards, and takes no memory.

    Args:
        model: the denoiser; may be on the meta device itself.
        config: of the checkpoint.
        stored: names of its tensors. A layer that has none of them, and that the denoiser does not have either, was
            taken off before the denoiser was saved, as an adapter may be.

    Raises:
        CheckpointError: the config names layers that the denoiser does not have.
        PlanError: it needs what this release does not implement.
    """
    plan = config.skeleton(model)
    modules = dict(model.named_modules())
    owners = {".".join(parts[:i]) for name in stored if (parts := name.split(".")) for i in range(1, len(parts))}
    for decided in (plan.layers, plan.attention):
        for name in decided.keys() - modules.keys() - owners:
            del decided[name]
    if unknown := [name for name in (*plan.layers, *plan.attention) if name not in modules]:
        raise CheckpointError(
            f"the checkpoint is of a quantized {plan.model} with a layer {unknown[0]!r} ({len(unknown)} such), which "
            f"this {type(model).__name__} does not have. Build the denoiser that was saved."
        )
    plan.check_shapes(model)
    for name, layer in plan.layers.items():
        if layer.quantized:
            _to_meta(modules[name])

    def restore(name: str, layer: nn.Module, context: TimestepContext) -> None:
        restore_layer(layer, plan.layers[name], context, *config.execution(name))

    def attend(name: str, module: nn.Module, *decided: Any) -> QuantizedAttention | None:
        return restore_attention(module, *decided, config.execution(name)[0])

    try:
        install(model, plan, restore, attend, **config.options)
    except (TypeError, KeyError, AttributeError) as error:
        raise PlanError(f"the quantization config of this checkpoint is damaged: {error}") from error
    return model


def finish(model: nn.Module, config: CheckpointConfig) -> nn.Module:
    """After the values of a rebuilt denoiser were loaded: check them, and let the routing follow them.

    Raises:
        CheckpointError: a scale, zero point or table cannot be right.
    """
    with _damage_named():
        bind_timestep_state(model)
    check_values(model)
    remember(model, config)
    return model


@contextmanager
def _damage_named() -> Iterator[None]:
    try:
        yield
    except TimestepError as error:
        raise CheckpointError(f"the timestep groups of the checkpoint are damaged: {error}") from error
    except (RuntimeError, ValueError) as error:
        if isinstance(error, DQError):
            raise
        raise CheckpointError(f"the checkpoint is damaged: {error}") from error


def _to_meta(layer: nn.Module) -> None:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise CheckpointError(
            f"a {type(layer).__name__} that the checkpoint quantizes has no weight: it is quantized already"
        )
    layer.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
