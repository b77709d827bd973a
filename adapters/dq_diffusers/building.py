"""Build a denoiser from a diffusers config alone: on the meta device, no weights, no hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dq_diffusers.host import diffusers_attribute
from dq_plugins.artifact.files import check_length
from dq_plugins.artifact.strict_json import parse_json
from dq_plugins.errors import DQError

MOST_MB = 16
"""The most that a config of diffusers may take."""

DENOISER_FOLDERS = ("transformer", "unet", "prior", "decoder")
"""Sub-folders of a pipeline that hold a denoiser, in the order they are looked for."""


def build_from_config(path: str | Path) -> nn.Module:
    """Build the denoiser that a config describes, without memory for its weights.

    Args:
        path: a model's ``config.json``, a folder that holds one, or a pipeline's folder (``model_index.json``), whose
            transformer or U-Net is taken.

    Returns:
        The denoiser on the meta device, in evaluation mode.

    Raises:
        DQError: there is no config, it names no diffusers model, or the model rejects it.
    """
    file = find_config(Path(path))
    config = read_config(file)
    cls = _model_class(config.get("_class_name"), file)
    try:
        with torch.device("meta"):
            model = cls.from_config(config)
    except Exception as error:
        raise DQError(
            f"{file}: {cls.__name__} cannot be built from this config: {type(error).__name__}: {error}. Compare its "
            f"fields with the arguments of {cls.__name__}; the config was written by diffusers "
            f"{config.get('_diffusers_version', 'of an unknown version')}."
        ) from error
    return model.eval()


def find_config(path: Path) -> Path:
    """The ``config.json`` of the denoiser at ``path``: a file, a model's folder, or a pipeline's folder.

    Raises:
        DQError: there is none.
    """
    if path.is_file():
        return find_config(path.parent) if path.name == "model_index.json" else path
    if (path / "config.json").is_file():
        return path / "config.json"
    for folder in DENOISER_FOLDERS:
        if (path / folder / "config.json").is_file():
            return path / folder / "config.json"
    folders = ", ".join(DENOISER_FOLDERS)
    found = f"there is no config.json in {path}, nor in a folder {folders} inside it" if path.exists() else ""
    raise DQError(
        f"{found or f'{path} does not exist'}. Expected is a diffusers model's config.json, its folder, or the folder "
        "of a saved pipeline; nothing is downloaded."
    )


def read_config(file: Path) -> dict[str, Any]:
    """A JSON file that diffusers wrote: ``config.json`` or ``model_index.json``.

    Raises:
        DQError: it cannot be read, is too large, or is no JSON object.
    """
    try:
        check_length(file.stat().st_size, file, MOST_MB)
        config = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DQError(f"{file} cannot be read as JSON: {error}. Expected is what diffusers writes.") from error
    if not isinstance(config, dict):
        raise DQError(f"{file} holds a {type(config).__name__}, not the object that diffusers writes.")
    return config


def _model_class(name: Any, file: Path) -> Any:
    cls = diffusers_attribute(name) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and hasattr(cls, "from_config")):
        raise DQError(
            f"{file}: its _class_name is {name!r}, which is not a model of diffusers "
            f"{diffusers_attribute('__version__')}. Expected is the config of a U-Net or transformer that diffusers "
            "knows, such as UNet2DConditionModel; for a denoiser of your own, call "
            "dq_plugins.partition(denoiser, example_inputs) from Python."
        )
    return cls
