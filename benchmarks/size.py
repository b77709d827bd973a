"""Bits, bytes on disk, bytes in memory and output error of quantized weights, by width, beside torchao's own.

    python -m benchmarks.size                        # the bundled denoisers: real safetensors files
    python -m benchmarks.size --only digits --recipe default
    python -m benchmarks.size --full-size            # also an SD-1.5-size U-Net, built without memory, bytes counted

``sum of bits`` is what the codes of all quantized weights take at their widths; ``codes`` is what they take in the
file, and ``codes / bits`` the ratio of both. Scales (and zero points, tables of activation ranges) and everything else
in the file (biases, norms, layers in floating point) are counted apart. ``resident`` is what the weights hold in memory
after the first call, with the layouts of the integer kernels; ``released`` the same after
`dq_torchao.release_weights`. Weights are rounded to nearest (one bit: signs), so few bits show a large error: what
learned rounding and training win back is measured elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dq_torchao
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

import dq_plugins as dq
from benchmarks.size_plans import WIDTHS, Bundled
from dq_plugins.bundled_denoisers import NAMES
from dq_plugins.metrics.output_error import output_sqnr
from dq_plugins.plan import ActivationQuant, LayerPlan, WeightQuant
from dq_plugins.report import Table
from dq_plugins.timesteps import TimestepContext, TimestepGroups

CODES, SCALES = ("weight_packed", "qdata"), ("scale", "zero_point", "scale_and_zero")
COLUMNS = (
    "variant", "sum of bits kB", "codes kB", "codes / bits", "scales kB", "rest kB", "file kB", "fp32 / file",
    "resident kB", "released kB", "SQNR dB",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Bytes of one variant of a denoiser.

    Attributes:
        bits: sum of the bits of all quantized weights, in bytes.
        codes: bytes of their codes in the file.
        scales: bytes of scales, zero points and tables of activation ranges in the file.
        rest: bytes of all other tensors in the file.
        file: bytes of the file, its header included.
        resident: bytes in memory after the first call.
        released: bytes in memory once packed weights that kernels hold too were let go of.
        sqnr: of the output on held-out calls, in dB; None where nothing can run.
    """

    bits: float
    codes: int
    scales: int
    rest: int
    file: int
    resident: int
    released: int
    sqnr: float | None = None


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, tensor subclasses taken apart."""

    def take_apart(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not hasattr(tensor, "__tensor_flatten__"):
            return {name: tensor.detach()}
        parts, _ = tensor.__tensor_flatten__()
        return {k: v for part in parts for k, v in take_apart(f"{name}.{part}", getattr(tensor, part)).items()}

    state = model.state_dict()
    return {k: v for name, tensor in state.items() for k, v in take_apart(name, tensor).items()}


def header_bytes(tensors: Mapping[str, Tensor]) -> int:
    """What a safetensors file holds before the tensors."""
    names = {torch.float32: "F32", torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.float64: "F64"}
    at, entries = 0, {}
    for name, tensor in tensors.items():
        offsets = [at, at := at + tensor.nbytes]
        entries[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    return 8 + -(-len(json.dumps(entries, separators=(",", ":"))) // 8) * 8


def split(sizes: Mapping[str, int]) -> tuple[int, int, int]:
    """Bytes of codes, of scales, and of the rest, by the names of the tensors."""
    codes = sum(size for name, size in sizes.items() if name.endswith(CODES))
    scales = sum(size for name, size in sizes.items() if name.endswith(SCALES))
    return codes, scales, sum(sizes.values()) - codes - scales


def file_sizes(path: Path) -> dict[str, int]:
    """Bytes of every tensor of a safetensors file, as the file says."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118  (not a dict)


def kernel_bytes(model: nn.Module) -> int:
    """Bytes that integer kernels hold beside the model."""
    from dq_torchao.kernels import prepacked_bytes
    from dq_torchao.packed_weight import PackedWeight

    return sum(prepacked_bytes(m.weight_packed) for m in model.modules() if isinstance(m, PackedWeight))


def measure(model: nn.Module, bits: float, calls: Any) -> Size:
    """Run a denoiser, write it to a file, and look at both."""
    sqnr = mean_sqnr(output_sqnr(model, calls))
    tensors = {name: tensor.contiguous() for name, tensor in plain_tensors(model).items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        safetensors.torch.save_file(tensors, path)
        parts, file = split(file_sizes(path)), path.stat().st_size
    resident = sum(tensor.nbytes for tensor in tensors.values()) + kernel_bytes(model)
    return Size(bits, *parts, file, resident, resident - dq_torchao.release_weights(model), sqnr)


def mean_sqnr(by_timestep: Mapping[float, float]) -> float | None:
    """Of the mean relative noise power."""
    noise = [10 ** (-value / 10) for value in by_timestep.values()]
    mean = sum(noise) / len(noise)
    return -10 * math.log10(mean) if mean > 0 else None


def planned_bits(model: nn.Module, plan: dq.QuantPlan) -> float:
    """Sum of the bits of all quantized weights, in bytes."""
    shapes = {name: model.get_submodule(name).weight.numel() for name in plan.layers}
    return sum(shapes[name] * layer.weight.bits / 8 for name, layer in plan.layers.items() if layer.weight)


def torchao_variants() -> dict[str, tuple[Callable[[nn.Module], None], int]]:
    """What torchao itself offers on this CPU build: a function that quantizes in place, and the width."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, quantize_

    def intx_takes(module: nn.Module, _: str) -> bool:
        # a convolution with one input channel per output makes torchao reshape wrongly
        return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.weight.shape[1] > 1)

    def int4_takes(module: nn.Module, _: str) -> bool:
        return type(module) is nn.Linear and module.out_features % 16 == 0 and module.in_features % 32 == 0

    int8 = Int8WeightOnlyConfig(set_inductor_config=False)
    intx = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0))
    int4 = PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
    return {
        "torchao Int8WeightOnly (linear)": (lambda model: quantize_(model, int8), 8),
        "torchao IntxWeightOnly int4 (linear, conv)": (lambda model: quantize_(model, intx, filter_fn=intx_takes), 4),
        "torchao Int4Opaque (linear)": (lambda model: quantize_(model, int4, filter_fn=int4_takes), 4),
    }


def torchao_bits(model: nn.Module, width: int) -> float:
    """Sum of the bits of the weights that torchao has made tensors of its own, in bytes."""
    quantized = (p for p in model.parameters() if hasattr(p, "__tensor_flatten__"))
    return sum(p.numel() * width / 8 for p in quantized)


def bundled_sizes(name: str, recipe: str, folder: Path) -> dict[str, Size]:
    """Every variant of a bundled denoiser."""
    case = Bundled(name, folder)
    full = sum(p.numel() * 4 for p in case.denoiser.parameters() if p.dim() > 1)
    sizes = {"fp32": measure(case.denoiser, full, case.held_out)}
    for label, plan in case.plans(recipe):
        quantized = dq.apply(case.denoiser, plan, backend="torchao")
        sizes[label] = measure(quantized, planned_bits(case.denoiser, plan), case.held_out)
        print(f"  {name}, {label}: {sizes[label]}", flush=True)
    for label, (quantize, width) in torchao_variants().items():
        quantized = copy.deepcopy(case.denoiser)
        try:
            quantize(quantized)
            sizes[label] = measure(quantized, torchao_bits(quantized, width), case.held_out)
        except (ImportError, RuntimeError, NotImplementedError, AssertionError) as error:
            print(f"  {name}, {label}: left out, {type(error).__name__}: {error}")
    return sizes


@torch.no_grad()
def counted_size(model: nn.Module, weight_bits: int, act_bits: int | None, groups: int = 8) -> Size:
    """Quantize every linear layer and 2-d convolution of ``model``, on the meta device, in place; count bytes."""
    from dq_torchao.lowering import INTEGER_LAYERS
    from dq_torchao.packed_weight import pack_layer

    edges = TimestepGroups(tuple(float(t) for t in range(100, 100 * groups, 100)))
    context = TimestepContext({"all": edges})
    table = torch.ones(groups), torch.zeros(groups, dtype=torch.int32)
    bits = prepacked = 0.0
    for layer in [m for m in model.modules() if type(m) in INTEGER_LAYERS]:
        weight = layer.weight
        quant = WeightQuant(weight_bits, torch.ones(len(weight)), scheme="binary" if weight_bits == 1 else "affine")
        bits += weight.numel() * weight_bits / 8
        if act_bits is None:
            pack_layer(layer, quant)
            continue
        plan = LayerPlan("", weight=quant, activation=ActivationQuant(act_bits, "all", *table), unquantized_reason=None)
        INTEGER_LAYERS[type(layer)].from_float(layer, plan, context)
        prepacked += weight.numel()
    tensors = plain_tensors(model)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    total = sum(sizes.values())
    released = total - split(sizes)[0] + prepacked if prepacked else total
    return Size(bits, *split(sizes), header_bytes(tensors) + total, int(total + prepacked), int(released))


def full_size() -> dict[str, Size]:
    """An SD-1.5-size U-Net at every width; eight timestep groups."""
    from dq_diffusers.building import build_from_config

    from benchmarks.graph_full_size import SD15

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SD15))
        model = build_from_config(folder)
    tensors = plain_tensors(model)
    total = sum(tensor.nbytes for tensor in tensors.values())
    sizes = {"fp32": Size(total, 0, 0, total, header_bytes(tensors) + total, total, total)}
    for label, (weight_bits, act_bits) in WIDTHS.items():
        sizes[label] = counted_size(copy.deepcopy(model), weight_bits, act_bits)
    return sizes


def table(sizes: Mapping[str, Size]) -> Table:
    """One row a variant."""
    full = sizes["fp32"].file
    rows = []
    for name, size in sizes.items():
        ratio = size.codes / size.bits if size.codes else None
        kilobytes = [round(v / 1e3, 1) for v in (size.scales, size.rest, size.file)]
        shown = [round(size.bits / 1e3, 1), round(size.codes / 1e3, 1), ratio and round(ratio, 5), *kilobytes]
        sqnr = None if size.sqnr is None else round(size.sqnr, 1)
        memory = [_cell(round(v / 1e3, 1)) for v in (size.resident, size.released)]
        rows.append([name, *map(_cell, shown), f"{full / size.file:.2f}x", *memory, sqnr])
    return Table(list(COLUMNS), rows)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:g}" if value < 10 else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", choices=NAMES, default=list(NAMES), help="bundled denoisers; default: both"
    )
    parser.add_argument("--recipe", default="default", help="that chooses the ranges of activations")
    parser.add_argument("--full-size", action="store_true", help="also an SD-1.5-size U-Net, bytes counted")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    args.out.mkdir(exist_ok=True)
    found: dict[str, dict[str, Size]] = {}
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = bundled_sizes(name, args.recipe, Path(folder))
    if args.full_size:
        found["sd15"] = full_size()
    for name, sizes in found.items():
        print(f"\n{name}\n\n{table(sizes)}")
        described = {"command": "python -m benchmarks.size", "torch": torch.__version__, "recipe": args.recipe}
        data = described | {"sizes": {label: asdict(size) for label, size in sizes.items()}}
        (args.out / f"size-{name}.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
