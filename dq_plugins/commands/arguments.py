"""Types of command-line arguments: what is wrong is refused before any work starts, and before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from dq_plugins import registry
from dq_plugins.bundled_denoisers import NAMES, folder_or_bundled
from dq_plugins.errors import DQError

MODEL_HELP = f"folder of a diffusers pipeline, its name on the hub, or a bundled denoiser: {', '.join(NAMES)}"


def model(text: str) -> str:
    """A pipeline: its folder, its name on the hub (``owner/name``), or the name of a bundled denoiser."""
    path = Path(folder_or_bundled(text))
    if path.exists() or text.count("/") != 1:
        if not path.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {text!r}; it may also be one of {', '.join(NAMES)}")
        if not (path / "model_index.json").is_file():
            raise argparse.ArgumentTypeError(
                f"{text!r} holds no pipeline: model_index.json is missing. Give a folder that a diffusers pipeline "
                "wrote with save_pretrained"
            )
    return str(path)


def folder(text: str) -> str:
    """A folder that is there."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return text


def plan_folder(text: str) -> str:
    """A folder with a plan, or that of a run with one."""
    return _folder_with("plan.json", "a plan", "quantize", text)


def calibration_folder(text: str) -> str:
    """A folder with recorded calls, or that of a run with them."""
    return _folder_with("manifest.json", "recorded calls", "record", text)


def _folder_with(file: str, what: str, command: str, text: str) -> str:
    if not (Path(folder(text)) / file).is_file():
        inside = [str(path.parent) for path in sorted(Path(text).glob(f"*/{file}"))]
        if len(inside) == 1:  # the folder of a run
            return inside[0]
        hint = f"give one of {', '.join(inside)}" if inside else f"`dq-plugins {command}` writes such a folder"
        raise argparse.ArgumentTypeError(f"{text!r} does not hold {what}: {file} is missing; {hint}")
    return text


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed, not {text!r}")
    return int(text)


def registered(kind: registry.Kind) -> Callable[[str], str]:
    """A type for the name of a plugin of this kind that can be used; its code is not loaded."""

    def name(text: str) -> str:
        try:
            registry.find(kind, text)
        except DQError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return name
