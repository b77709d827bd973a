"""Everything that a GPU has to show, in one command of less than ten minutes.

    python -m benchmarks.gpu                      # prints the tables, and keeps what was measured
    python -m benchmarks.gpu --device cpu --batch 1 --seconds 60   # tries the command without a GPU

First single layers (linear, convolution, attention), then whole steps of the U-Net and of the DiT: bfloat16, torchao's
dynamic int8, and ours with one range, a group table, in float32 and in bfloat16; eager, then compiled. What the time
does not suffice for is named.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.latency import COLUMNS, measure, table, to_device
from benchmarks.models import dit, unet
from benchmarks.records import Records
from dq_plugins.metrics.latency import compare_latency
from dq_plugins.plan import ActivationQuant, LayerPlan, WeightQuant
from dq_plugins.report import Table
from dq_plugins.timesteps import TimestepContext, TimestepGroups

EAGER = [
    "bf16",
    "fp32",
    "torchao int8 dynamic",
    "W8A8, 1 group, uniform t (ours)",
    "W8A8, 8 groups, uniform t (ours)",
    "W8A8, 8 groups, uniform t, bf16 (ours)",
]
COMPILED = [
    "bf16",
    "torchao int8 dynamic",
    "W8A8, 1 group, uniform t, bf16 (ours)",
    "W8A8, 8 groups, uniform t, bf16 (ours)",
]
STEPS = [(name, mode) for mode in ("", "whole") for name in ("dit", "unet")]
BUILDERS = {"dit": dit, "unet": unet}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 384 -> 1536, 4096 tokens": (lambda: nn.Linear(384, 1536), (4096, 384)),
    "linear 3072 -> 3072, 4096 tokens": (lambda: nn.Linear(3072, 3072), (4096, 3072)),
    "linear 3072 -> 12288, 4096 tokens": (lambda: nn.Linear(3072, 12288), (4096, 3072)),
    "3 x 3, 320 channels, 64 x 64": (lambda: nn.Conv2d(320, 320, 3, padding=1), (2, 320, 64, 64)),
    "3 x 3, 1280 channels, 16 x 16": (lambda: nn.Conv2d(1280, 1280, 3, padding=1), (2, 1280, 16, 16)),
}


def integer_layer(layer: nn.Module, context: TimestepContext) -> nn.Module:
    """``layer`` in integers, with the two groups of ``context``."""
    from dq_torchao.lowering import lower_layer

    scale = layer.weight.detach().flatten(1).abs().amax(1).float() / 127
    activation = ActivationQuant(8, "all", torch.full((2,), 0.03), torch.tensor([3, -5], dtype=torch.int32))
    plan = LayerPlan("", weight=WeightQuant(8, scale.cpu()), activation=activation, unquantized_reason=None)
    execution = lower_layer(layer, plan, context)
    if execution.state != "integer":
        raise SystemExit(f"no integers on this device: {execution.reason}")
    return layer


@torch.no_grad()
def layers(device: str, until: float, records: Records) -> Iterator[list[Any]]:
    """Milliseconds of single layers, quantization of their input included, in bfloat16 and in integers."""
    context = TimestepContext({"all": TimestepGroups((500.0,))})
    for label, (make, shape) in LAYERS.items():
        if time.monotonic() > until:
            yield [label, "left out", "left out", ""]
            continue
        torch.manual_seed(0)
        layer = make().to(device, torch.bfloat16).requires_grad_(False)
        x = torch.randn(shape, device=device, dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
        reference, integer = layer, integer_layer(make().to(device, torch.bfloat16).requires_grad_(False), context)
        with context.select(torch.tensor([700.0], device=device)):
            found = compare_latency({"bf16": partial(reference, x), "int8": partial(integer, x)}, rounds=20, warmup=3)
        ms = {name: latency.median for name, latency in found.items()}
        records.put(label, ms | {"ratio": ms["bf16"] / ms["int8"]})
        yield [label, ms["bf16"], ms["int8"], ms["bf16"] / ms["int8"]]
    for heads, tokens, channels in ((6, 256, 64), (24, 4096, 128)):
        q = torch.randn(2, heads, tokens, channels, device=device, dtype=torch.bfloat16)
        forms = {"bf16": partial(F.scaled_dot_product_attention, q, q, q)}
        ms = compare_latency(forms, rounds=20, warmup=3)["bf16"].median
        label = f"attention, {heads} heads, {tokens} tokens, {channels} channels"
        records.put(label, {"bf16": ms})
        yield [label, ms, "PyTorch's own", ""]


def steps(device: str, batch: int, until: float, records: Records) -> Iterator[str]:
    """A table for each denoiser and mode, as long as there is time."""
    for name, mode in STEPS:
        title = f"{name}, batch {batch}, {'compiled' if mode else 'eager'}"
        if time.monotonic() > until:
            yield f"{title}: left out, the time is up"
            continue
        torch._dynamo.reset()
        model = to_device(BUILDERS[name](batch), device)
        rows = measure(model, COMPILED if mode else EAGER, device=device, modes=[mode], rounds=15)
        records.put(title, [{**row._asdict(), "latency": vars(row.latency)} for row in rows])
        yield f"\n{title} (columns: {', '.join(COLUMNS)})\n\n{table(rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=16, help="samples of a step")
    parser.add_argument("--seconds", type=float, default=420, help="after them no further table is begun")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --device cpu --batch 1 tries the command")
    warnings.filterwarnings("ignore")
    until = time.monotonic() + args.seconds
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    records = Records(f"gpu-{args.device}", {"device": name, "batch": args.batch})
    print(f"{name}, torch {torch.__version__}\n")
    print(
        Table(["layer", "bf16, ms", "int8, ms", "bf16 over int8"], list(layers(args.device, until, records))),
        flush=True,
    )
    for text in steps(args.device, args.batch, until, records):
        print(text, flush=True)


if __name__ == "__main__":
    main()
