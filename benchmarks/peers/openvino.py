"""OpenVINO with NNCF's post-training quantization: static ranges, bias correction, products inside attention too.

NNCF's documentation has its mode for transformers for diffusion models. The result runs in OpenVINO's own runtime.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import Method, Quantized, Setting
from benchmarks.peers.standing_in import standing_in

REQUIREMENTS = ("openvino==2026.4.1", "nncf==3.4.0")


class Positional(nn.Module):
    """A denoiser called with tensors in the order of ``names``, as exporters want it."""

    def __init__(self, denoiser: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.denoiser, self.names = denoiser, names

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.denoiser(**dict(zip(self.names, inputs, strict=True)))
        return out if isinstance(out, Tensor) else out[0]


class OpenVinoRuntime(nn.Module):
    """A model that OpenVINO has compiled, called like the denoiser it was made from."""

    own_runtime = True  # nothing for torch.compile

    def __init__(self, run: Callable[[tuple[Any, ...]], Any], names: list[str]) -> None:
        super().__init__()
        self.run, self.names = run, names

    def forward(self, **inputs: Tensor) -> Tensor:
        return torch.from_numpy(self.run(tuple(inputs[name].numpy() for name in self.names))[0])


def tensors_of(call: dict[str, Any]) -> dict[str, Tensor]:
    """The arguments that a converted model takes."""
    return {name: value for name, value in call.items() if isinstance(value, Tensor)}


def converted(denoiser: nn.Module, example: dict[str, Tensor]) -> Any:
    """OpenVINO's model of a denoiser."""
    import openvino  # pyrefly: ignore [missing-import]

    with torch.no_grad():
        return openvino.convert_model(torch.export.export(Positional(denoiser, list(example)), tuple(example.values())))


def compiled(model: Any, names: list[str]) -> OpenVinoRuntime:
    """The model in OpenVINO's runtime, on as many threads as PyTorch has."""
    import openvino  # pyrefly: ignore [missing-import]

    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    return OpenVinoRuntime(openvino.compile_model(model, "CPU", options), names)


def quantized(denoiser: nn.Module, calls: Sequence[dict[str, Tensor]], *, fast_bias_correction: bool = True) -> Any:
    """NNCF's model of a denoiser, calibrated on ``calls``."""
    import nncf  # pyrefly: ignore [missing-import]

    return nncf.quantize(
        converted(denoiser, calls[0]),
        nncf.Dataset([tuple(x.numpy() for x in call.values()) for call in calls]),
        subset_size=len(calls),
        model_type=nncf.ModelType.TRANSFORMER,
        fast_bias_correction=fast_bias_correction,
    )


def static(setting: Setting) -> Quantized:
    """The accurate bias correction; the size is that of the weights' file."""
    import openvino  # pyrefly: ignore [missing-import]

    calls = [tensors_of(call) for call in setting.calls()]
    model = quantized(setting.denoiser, calls, fast_bias_correction=False)
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(model, str(Path(folder) / "model.xml"), compress_to_fp16=False)
        size = (Path(folder) / "model.bin").stat().st_size
    runtime = compiled(model, list(calls[0]))
    tuples = not isinstance(setting.denoiser(**setting.calls()[0]), Tensor)

    def run(**call: Any) -> Any:
        out = runtime(**tensors_of(call))
        return (out,) if tuples else out

    return Quantized(standing_in(setting.denoiser, run), size)


METHODS = {"OpenVINO, NNCF": Method(static, ("W8A8",), "integer")}
