"""Int8 denoisers of other projects, for comparison: SDNQ, and OpenVINO with NNCF.

    pip install sdnq openvino nncf     # the extra "peers"

SDNQ quantizes weights ahead of time and activations while running. NNCF calibrates static ranges, corrects biases, and
also quantizes the products inside attention; the result runs in OpenVINO's own runtime, compiled there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import Inputs, Model


class Positional(nn.Module):
    """A denoiser called with tensors in the order of ``names``, as exporters want it."""

    def __init__(self, denoiser: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.denoiser, self.names = denoiser, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.denoiser(**dict(zip(self.names, inputs, strict=True)), return_dict=False)[0]


class OpenVinoRuntime(nn.Module):
    """A model that OpenVINO has compiled, called like the denoiser it was made from."""

    own_runtime = True  # nothing for torch.compile

    def __init__(self, run: Callable[[tuple[Any, ...]], Any], names: list[str]) -> None:
        super().__init__()
        self.run, self.names = run, names

    def forward(self, **inputs: Tensor) -> Tensor:
        return torch.from_numpy(self.run(tuple(inputs[name].numpy() for name in self.names))[0])


def sdnq(model: Model) -> nn.Module:
    """Int8 products in linear and convolution layers."""
    from sdnq import sdnq_post_load_quant  # pyrefly: ignore [missing-import]

    return sdnq_post_load_quant(
        copy.deepcopy(model.denoiser),
        weights_dtype="int8",
        quant_conv=True,
        use_quantized_matmul=True,
        use_quantized_matmul_conv=True,
        add_skip_keys=False,
    )


def _openvino(model: Model, quantize: Callable[[Any, Inputs], Any]) -> nn.Module:
    import openvino  # pyrefly: ignore [missing-import]

    example = model.inputs(500, 0)
    with torch.no_grad():
        exported = torch.export.export(Positional(model.denoiser, list(example)), tuple(example.values()))
    converted = quantize(openvino.convert_model(exported), example)
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    return OpenVinoRuntime(openvino.compile_model(converted, "CPU", options), list(example))


def openvino_float(model: Model) -> nn.Module:
    """OpenVINO in full precision."""
    return _openvino(model, lambda converted, _: converted)


def openvino_int8(model: Model, timesteps: tuple[int, ...]) -> nn.Module:
    """NNCF's post-training quantization for transformers, calibrated at ``timesteps``."""
    import nncf  # pyrefly: ignore [missing-import]

    def quantize(converted: Any, _: Inputs) -> Any:
        calls = [tuple(x.numpy() for x in model.inputs(t, t).values()) for t in timesteps]
        return nncf.quantize(
            converted, nncf.Dataset(calls), subset_size=len(calls), model_type=nncf.ModelType.TRANSFORMER
        )

    return _openvino(model, quantize)
