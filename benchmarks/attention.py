"""Integer attention: its speed beside PyTorch's, and what it does to the final images.

    python -m benchmarks.attention speed                      # one thread, CPU time of the thread, interleaved
    python -m benchmarks.attention images --model digits      # 32 images x 3 seeds, with and without it
    python -m benchmarks.attention widths --model digits      # its operands at several widths, fake-quantized

``images`` and ``widths`` go on where they were stopped. Error power is that against full precision's images from the
same noise.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dq_torchao.kernels import code_offset
from dq_torchao.kernels.attention import attention_kernel, int8_attention
from torch.nn import functional as F

import dq_plugins as dq
from benchmarks.records import Records
from benchmarks.tfmq import MODELS, Case, usual_steps
from dq_plugins.affine import affine_parameters
from dq_plugins.metrics.latency import compare_latency, thread_clock
from dq_plugins.passes.allocation.problem import LayerCost
from dq_plugins.passes.attention import attention_sizes
from dq_plugins.quantized.attention import site_name
from dq_plugins.quantized.width import Width
from dq_plugins.recipe import PassContext, Step
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
WIDTHS = (4, 5, 6, 8)
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
        found = [affine_parameters(x.min(), x.max(), 8, symmetric=False) for x in (q, k, v)]
        ranges = [p.reshape(1) for scale, zero_point in found for p in (scale, zero_point + code_offset(q.device))]
        forms = {
            "integer": partial(int8_attention, q, k, v, None, False, channels**-0.5, *ranges, 8, q.dtype),
            "floating": partial(F.scaled_dot_product_attention, q, k, v),
        }
        rounds = max(5, min(31, 10**9 // (samples * heads * queries * keys)))
        latencies = compare_latency(forms, rounds=rounds, clock=thread_clock(q.device), until_stable=True)
        ms = {name: latency.median for name, latency in latencies.items()}
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


def attention_widths(plan: dq.QuantPlan) -> str:
    """Widths of the attentions of a plan, in order."""
    return " ".join(attention.width for attention in plan.attention.values())


def uniform(case: Case, seed: int, bits: int | None) -> dq.QuantPlan:
    """All attentions at one width; None: in floating point."""
    before, _ = RECIPES["min-max"]
    return case.plan((*before, *([] if bits is None else [Step("attention-ranges", {"bits": bits})])), seed)


def allocated(case: Case, seed: int, bits: int) -> dq.QuantPlan:
    """Widths of attentions within the bit operations that all of them take at one width; layers as they were."""
    plan, context = uniform(case, seed, 8), PassContext(case.denoiser, case.calibration(seed))
    costs = {name: LayerCost(0, 0, info.macs) for name, info in context.partition.layers.items()}
    layers = sum(costs[n].bit_operations(Width.parse(layer.width), 32) for n, layer in plan.layers.items())
    sizes = attention_sizes(context, [site_name(name) for name in plan.attention])
    each = [LayerCost(0, size.inputs, size.macs, value_macs=size.value_macs) for size in sizes.values()]
    limit = layers + sum(cost.bit_operations(Width(activation=bits), 32) for cost in each)
    pinned = {name: layer.width for name, layer in plan.layers.items()}
    before, _ = RECIPES["min-max"]
    measured = Step("sensitivity", {"weight_choices": (8,), "act_choices": WIDTHS})
    return case.plan((*before, ATTENTION, measured, Step("bit-allocation", {"bitops": limit, "pinned": pinned})), seed)


def widths(model: str, count: int, seeds: int) -> Table:
    """Error power of final images by the widths of attentions, beside that with all attention in floating point."""
    steps, rows = usual_steps(model), []
    records = Records(f"attention-widths-{model}", {"images": count, "steps": steps})
    forms: dict[str, Callable[[Case, int], dq.QuantPlan]] = {"floating point": partial(uniform, bits=None)}
    forms |= {f"{bits} bits": partial(uniform, bits=bits) for bits in sorted(WIDTHS, reverse=True)}
    forms |= {f"allocated, BitOps of {bits} bits": partial(allocated, bits=bits) for bits in (6, 5)}
    with tempfile.TemporaryDirectory() as folder:
        case = Case(model, steps, Path(folder))
        reference = case.images(case.denoiser, count)

        def measured(form: str, seed: int) -> dict[str, Any]:
            plan = forms[form](case, seed)
            found = case.images(dq.apply(case.denoiser, plan, backend="simulate"), count)
            power = np.square(found.astype(np.float64) - reference).reshape(count, -1).mean(1)
            return {"widths": attention_widths(plan), "power": power.tolist()}

        for form in forms:
            runs = [records.get(f"{form}, {seed}", partial(measured, form, seed)) for seed in range(seeds)]
            power = np.array([run["power"] for run in runs])
            floating = [records.data[f"floating point, {seed}"]["power"] for seed in range(seeds)]
            psnr, ratio = float(10 * np.log10(1 / np.median(power))), float(power.mean() / np.mean(floating))
            rows.append([form, "; ".join(dict.fromkeys(run["widths"] for run in runs)), psnr, ratio])
            records.put(form, {"seeds": seeds, "psnr": psnr, "ratio": ratio})
            print(*rows[-1], flush=True)
    title = f"{model}, W8A8, {count} images x {seeds} seeds: attention"
    return Table([title, "widths", "PSNR", "error power, over that in floating point"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "images", "widths"])
    parser.add_argument("--model", default="digits", choices=MODELS)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    args = parser.parse_args()
    if args.what == "speed":
        print(speed())
    elif args.what == "images":
        print(images(args.model, args.images, args.seeds, args.recipes))
    else:
        print(widths(args.model, args.images, args.seeds))


if __name__ == "__main__":
    main()
