"""One layer with a low-bit weight and floating activations: time and bytes a value, ours beside torchao's own classes.

    python -m benchmarks.weight_only --threads 1

Layers take turns, and the first quartile of the calls counts, so ratios of one run compare. Eager mode. A class that
leaves a layer alone is listed.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.size import plain_tensors, torchao_variants
from dq_plugins.metrics.latency import compare_latency
from dq_plugins.plan import LayerPlan, Reason, WeightQuant
from dq_plugins.quantized.weight_scale import weight_parameters
from dq_plugins.report import Table
from dq_plugins.timesteps import TimestepContext

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 1280 x 1280, 256 tokens": (lambda: nn.Linear(1280, 1280), (1, 256, 1280)),
    "linear 1280 x 1280, 1 token": (lambda: nn.Linear(1280, 1280), (1, 1280)),
    "conv 320 x 320 x 3 x 3, 32 x 32": (lambda: nn.Conv2d(320, 320, 3, padding=1), (1, 320, 32, 32)),
}


def ours(layer: nn.Module, bits: int) -> nn.Module:
    """The layer with a packed weight."""
    from dq_torchao.lowering import lower_layer

    scale, _ = weight_parameters(layer.weight, bits, method="minmax")  # type: ignore[arg-type]
    quant = WeightQuant(bits, scale, scheme="binary" if bits == 1 else "affine")
    lower_layer(
        layer, LayerPlan("", weight=quant, unquantized_reason=Reason("inputs stay as they are")), TimestepContext({})
    )
    return layer


def forms(layer: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layer in every form, by name, and why a form is missing."""
    found, missing = {"fp32": layer}, {}
    found |= {f"packed, {bits} bits (ours)": ours(copy.deepcopy(layer), bits) for bits in (8, 4, 3, 2, 1)}
    for name, (quantize, _) in torchao_variants().items():
        model = nn.Sequential(copy.deepcopy(layer))
        try:
            quantize(model)
            if type(model[0].weight.data) is Tensor:
                missing[name] = f"leaves {type(layer).__name__} as it is"
            else:
                found[name] = model
        except (ImportError, RuntimeError, NotImplementedError, AssertionError) as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


@torch.no_grad()
def measure(name: str, rounds: int) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Milliseconds, ratio to fp32 and bytes a value of every form."""
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer, x = build().requires_grad_(False), torch.randn(shape)
    found, missing = forms(layer)
    calls = {form: (lambda module=module: module(x)) for form, module in found.items()}
    latencies = compare_latency(calls, rounds=rounds)
    values = layer.weight.numel()
    rows = {}
    for form, module in found.items():
        held = sum(t.nbytes for n, t in plain_tensors(module).items() if "bias" not in n)
        ratio = latencies[form].low / latencies["fp32"].low
        rows[form] = {"ms": latencies[form].low, "against_fp32": ratio, "bytes_per_value": held / values}
    return rows, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    results = {}
    for name in LAYERS:
        rows, missing = measure(name, args.rounds)
        cells = [[form, *(round(value, 3) for value in row.values())] for form, row in rows.items()]
        print(f"\n{name}\n\n{Table(['form', 'ms', 'against fp32', 'bytes a value'], cells)}")
        print("".join(f"{form}: {reason}\n" for form, reason in missing.items()))
        results[name] = {"forms": rows, "missing": missing}
    args.out.mkdir(exist_ok=True)
    described = {"torch": torch.__version__, "threads": args.threads, "rounds": args.rounds, "layers": results}
    (args.out / "weight-only.json").write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
