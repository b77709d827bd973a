"""Integer attention: its speed beside PyTorch's, and what it does to the final images.

    python -m benchmarks.attention speed                      # one thread, CPU time of the thread, interleaved
    python -m benchmarks.attention images --model digits      # 32 images x 3 seeds, with and without it

``images`` goes on where it was stopped. Error power is that against full precision's images from the same noise.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from dq_torchao.kernels.attention import attention_kernel, int8_attention
from torch.nn import functional as F

import dq_plugins as dq
from benchmarks.records import Records
from benchmarks.tfmq import MODELS, Case, usual_steps
from dq_plugins.affine import affine_parameters
from dq_plugins.metrics.latency import compare_latency, thread_clock
from dq_plugins.recipe import Step
from dq_plugins.report import Table

SHAPES = (  # samples, heads, queries, keys, channels of a head
    (2, 6, 256, 256, 64),  # the DiT of benchmarks.models
    (2, 2, 1024, 1024, 64),  # its U-Net, to itself and to a text
    (2, 4, 256, 256, 64),
    (2, 8, 64, 64, 64),
    (2, 2, 1024, 77, 64),
    (2, 4, 256, 77, 64),
    (8, 4, 64, 64, 32),
    (2, 8, 256, 256, 32),
    (2, 8, 256, 256, 80),
    (2, 4, 256, 256, 128),
    (2, 8, 4096, 4096, 40),  # Stable Diffusion 1.5 at 512 x 512
)
ATTENTION = Step("attention-ranges")
MIN_MAX = Step("activation-ranges", {"observer": "minmax"})
ROUNDED = Step("channel-balance"), Step("weight-ranges"), Step("gptq")
RECIPES = {
    "min-max": ((Step("weight-ranges"), Step("timestep-groups", {"method": "uniform"}), MIN_MAX), ()),
    "default": ((*ROUNDED, Step("timestep-groups"), MIN_MAX), (Step("bias-correction"),)),
}


def speed() -> Table:
    """Milliseconds of the operator alone, ranges known, quantization of its operands included."""
    torch.set_num_threads(1)
    kernel = attention_kernel(torch.device("cpu"))
    if kernel.unsupported_reason:
        raise SystemExit(kernel.unsupported_reason)
    records = Records("attention-speed", {"threads": 1})
    rows = []
    for samples, heads, queries, keys, channels in SHAPES:
        q, k, v = (torch.randn(samples, n, heads, channels).transpose(1, 2) for n in (queries, keys, keys))
        ranges = [p.reshape(1) for x in (q, k, v) for p in affine_parameters(x.min(), x.max(), 8, symmetric=False)]
        forms = {
            "integer": partial(int8_attention, q, k, v, None, False, channels**-0.5, *ranges, 8),
            "floating": partial(F.scaled_dot_product_attention, q, k, v),
        }
        rounds = max(5, min(31, 10**9 // (samples * heads * queries * keys)))
        found = compare_latency(forms, rounds=rounds, clock=thread_clock(q.device), until_stable=True)
        ms = {name: latency.median for name, latency in found.items()}
        ms["ratio"] = ms["floating"] / ms["integer"]
        label = f"{samples} x {heads} heads, {queries} x {keys} tokens, {channels} channels"
        records.put(label, ms)
        rows.append([label, ms["floating"], ms["integer"], ms["ratio"]])
        print(*rows[-1], flush=True)
    return Table(["shape", "PyTorch, ms", "integer, ms", "PyTorch over integer"], rows)


def powers(case: Case, recipe: str, seed: int, quantized: bool, backend: str, reference: np.ndarray) -> list[float]:
    """Mean squared error of every image."""
    before, after = RECIPES[recipe]
    plan = case.plan((*before, *((ATTENTION,) if quantized else ()), *after), seed)
    images = case.images(dq.apply(case.denoiser, plan, backend=backend), len(reference))
    return np.square(images.astype(np.float64) - reference).reshape(len(reference), -1).mean(1).tolist()


def images(model: str, count: int, seeds: int, recipes: list[str]) -> Table:
    """Error power with quantized attention over that without, simulated and in integers."""
    steps, rows = usual_steps(model), []
    records = Records(f"attention-images-{model}", {"images": count, "steps": steps})
    with tempfile.TemporaryDirectory() as folder:
        case = Case(model, steps, Path(folder))
        reference = case.images(case.denoiser, count)
        for recipe in recipes:
            for backend in ("simulate", "torchao"):
                found = {
                    quantized: [
                        value
                        for seed in range(seeds)
                        for value in records.get(
                            f"{recipe}, {backend}, {'integer' if quantized else 'floating'} attention, {seed}",
                            partial(powers, case, recipe, seed, quantized, backend, reference),
                        )
                    ]
                    for quantized in (False, True)
                }
                without, with_it = (float(np.mean(found[key])) for key in (False, True))
                psnr = [float(10 * np.log10(1 / np.median(found[key]))) for key in (False, True)]
                rows.append([recipe, backend, *psnr, with_it / without])
                records.put(f"{recipe}, {backend}", {"seeds": seeds, "psnr": psnr, "ratio": with_it / without})
                print(*rows[-1], flush=True)
    title = f"{model}, W8A8, {count} images x {seeds} seeds"
    return Table([title, "backend", "PSNR without", "PSNR with", "error power, with over without"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "images"])
    parser.add_argument("--model", default="digits", choices=MODELS)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    args = parser.parse_args()
    print(speed() if args.what == "speed" else images(args.model, args.images, args.seeds, args.recipes))


if __name__ == "__main__":
    main()
