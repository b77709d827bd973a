"""What a user would pick instead, on the same denoiser, noise and calibration images: one file for each project.

    python -m benchmarks.peers --models digits --widths W8A8 W4A8 --seeds 3

A file names the packages that its project needs (`REQUIREMENTS`, pinned; none for what is installed anyway) and the
ways to use it (`METHODS`). The command makes an environment for each on top of the running one (`environment`), so that
no other PyTorch is installed, and runs each method in a process of its own (`worker`): what goes in is a folder of
recorded calls and a job in JSON; what comes out are images in safetensors and measurements in JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dq_plugins.calibration import CalibrationSet

Widths = tuple[int, int | None]  # of weights and of activations; None: floating point
WIDTHS: dict[str, Widths] = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W4": (4, None), "mean-4": (4, 8)}
"""By label; the weights of ``mean-4`` have four bits in the mean, and every layer its own."""
NAMES = ("ours", "torchao", "openvino", "sdnq", "quanto", "modelopt", "brevitas")


@dataclass(frozen=True)
class Setting:
    """What a method is given.

    Attributes:
        denoiser: in full precision; a copy that the method may change.
        calibration: recorded calls.
        widths: that are asked for.
        seed: of whatever the method draws.
    """

    denoiser: nn.Module
    calibration: CalibrationSet
    widths: Widths
    seed: int = 0

    def calls(self) -> list[dict[str, Any]]:
        """Arguments of every recorded call."""
        return [call.kwargs for call in self.calibration.calls()]

    def run_calls(self, denoiser: Callable[..., Any]) -> None:
        """Call it as every recorded call did."""
        with torch.no_grad():
            for call in self.calibration.calls():
                denoiser(**call.kwargs)


@dataclass(frozen=True)
class Quantized:
    """What a method gives back.

    Attributes:
        denoiser: called like the one in full precision.
        bytes: of its weights, as the project stores them.
    """

    denoiser: nn.Module
    bytes: int


@dataclass(frozen=True)
class Method:
    """One way to use a project.

    Attributes:
        quantize: makes the quantized denoiser.
        widths: labels of those that it has.
        runs: ``"integer"``, ``"weight-only"`` or ``"simulated"``.
        note: what stays in floating point.
    """

    quantize: Callable[[Setting], Quantized]
    widths: Sequence[str]
    runs: str
    note: str = ""


def linear_and_conv(denoiser: nn.Module) -> list[str]:
    """Names of the layers that the projects quantize."""
    return [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def simulated_bytes(denoiser: nn.Module, bits: dict[str, int]) -> int:
    """Bytes of a denoiser whose weights are simulated at so many bits, the rest in float32."""
    total = sum(4 * p.numel() for p in denoiser.parameters())
    weights = {name: denoiser.get_parameter(f"{name}.weight").numel() for name in bits}
    return total - sum(count * (32 - bits[name]) // 8 for name, count in weights.items())
