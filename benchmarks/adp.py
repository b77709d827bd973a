"""Ways to choose activation ranges over timesteps, side by side: error, storage and run-time cost, W8 and A8, A6, A4.

    python -m benchmarks.adp [--models digits emoji] [--seeds 3] [--out adp-report]

One static range; uniform groups; the exact dynamic program's groups; groups searched by gradient descent; a range for
each timestep; and ranges computed at run time, per token (what torchao does by default for linear layers; a
convolution, which torchao leaves alone, gets one range per sample). Weights are the same 8-bit ones in all of them.

Output error: squared error of the denoiser's output over its squared output, on recorded calls of other seeds, every
step from the full-precision input. Everything is fake-quantized. Storage: scales and zero points of all activations.
Cost: time to quantize one layer's input, eager, over that of a static range; compiled: benchmarks/latency.py.

Every measured row is kept in the folder ``--out`` and not measured again: name another folder for other settings. The
search takes minutes a row, the others seconds: ``--methods`` leaves some out, but not ``static``.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from dq_diffusers.recording import denoiser_of, load_pipeline, sampler
from torch import Tensor, nn

import dq_plugins as dq
from benchmarks.records import Records
from dq_plugins.affine import affine_parameters, fake_quantize, integer_range
from dq_plugins.bundled_denoisers import bundled
from dq_plugins.calibration import CalibrationSet
from dq_plugins.demo import PROMPTS
from dq_plugins.metrics.latency import compare_latency
from dq_plugins.passes.ranges.activation_ranges import ActivationRanges
from dq_plugins.passes.ranges.timestep_groups import TimestepGrouping
from dq_plugins.plan import ActivationQuant, QuantPlan, Targets
from dq_plugins.quantized.layer import simulate_layer
from dq_plugins.recipe import PassContext, Recipe, Step
from dq_plugins.timesteps import TimestepContext

WIDTHS = (8, 6, 4)
METHODS = ("static", "uniform", "dp", "search", "per timestep", "per token")
HELD_OUT_SEED = 10_000


def grouping(method: str, groups: int, rounds: int) -> dict[str, Any]:
    """Options of the pass ``timestep-groups`` for a method of the table."""
    return {
        "static": {"groups": 1},
        "uniform": {"method": "uniform", "groups": groups},
        "dp": {"groups": groups},
        "search": {"method": "search", "groups": groups, "rounds": rounds},
        "per timestep": {"groups": 1_000_000},
    }[method]


def planned(base: QuantPlan, context: PassContext, options: dict[str, Any]) -> QuantPlan:
    """The plan with its activations quantized at the context's width."""
    plan = QuantPlan.load(base.save(Path(context.workdir or ".") / "base"))
    for each in (TimestepGrouping(**options), ActivationRanges()):
        for _ in each.run(plan, context) or ():
            pass
    return plan.validate()


@torch.no_grad()
def output_error(model: nn.Module, held: CalibrationSet) -> float:
    noise = signal = 0.0
    for call in held.calls():
        noise += float((call.run(model) - call.output).double().square().sum())
        signal += float(call.output.double().square().sum())
    return noise / signal


def dynamic_quantize(x: Tensor, bits: int, *, tokens: bool) -> Tensor:
    """Symmetric ranges from the values themselves: one per token, or one per sample."""
    top = x.abs().amax(-1, keepdim=True) if tokens else x.abs().flatten(1).amax(1).reshape(-1, *[1] * (x.dim() - 1))
    scale, _ = affine_parameters(-top, top, bits, symmetric=True)
    return fake_quantize(x, scale, 0, *integer_range(bits))


def dynamic(denoiser: nn.Module, plan: QuantPlan) -> nn.Module:
    """The planned weights and widths, with ranges computed at run time."""
    student = copy.deepcopy(denoiser)
    for name, layer in plan.layers.items():
        simulate_layer(student.get_submodule(name), replace(layer, activation=None), TimestepContext({}))
        if layer.activation is not None:
            module = student.get_submodule(name)
            bits, tokens = layer.activation.bits, isinstance(module, nn.Linear)
            module.register_forward_pre_hook(
                lambda _m, args, b=bits, k=tokens: (dynamic_quantize(args[0], b, tokens=k), *args[1:])
            )
    return student


def storage(plan: QuantPlan) -> int:
    """Bytes of activation parameters: a float32 scale and an int8 zero point for each layer and group."""
    return sum(
        5 * len(layer.activation.scale)
        for layer in plan.layers.values()
        if isinstance(layer.activation, ActivationQuant)
    )


def measure(
    denoiser: nn.Module, calib: CalibrationSet, held: CalibrationSet, args: argparse.Namespace, seed: int, folder: Path
) -> Iterator[dict[str, Any]]:
    """One row for each width and method, but for those that the folder holds."""
    base = dq.make_plan(denoiser, calib, Recipe("weights", "", (Step("weight-ranges"),)), progress=False)
    context = PassContext(denoiser, calib, seed=seed, workdir=folder)
    for bits, method in ((b, m) for b in args.widths for m in args.methods):
        file = folder / f"A{bits}-{method}.json"
        if not file.is_file():
            context.targets = Targets(act_bits=bits)
            with torch.no_grad():
                row = {"bits": bits, "method": method, **one_row(method, base, context, held, args)}
            file.write_text(json.dumps(row))
            print(json.dumps(row), flush=True)
        yield json.loads(file.read_text())


def one_row(
    method: str, base: QuantPlan, context: PassContext, held: CalibrationSet, args: argparse.Namespace
) -> dict[str, Any]:
    """Error, storage, number of groups, and what the search says."""
    per_token = method == "per token"
    plan = planned(base, context, grouping("static" if per_token else method, args.groups, args.rounds))
    if per_token:
        return {"error": output_error(dynamic(context.denoiser, plan), held), "bytes": 0, "groups": 0}
    error = output_error(dq.apply(context.denoiser, plan, "simulate"), held)
    row: dict[str, Any] = {"error": error, "bytes": storage(plan), "groups": len(plan.groups["default"])}
    if method == "search":
        row["search"] = plan.sections["timestep-groups"].data["search"]
    return row


def quantizing_cost(calib: CalibrationSet, denoiser: nn.Module, groups: int) -> dict[str, float]:
    """Time to quantize one linear layer's input to int8, over that of a static range; median of interleaved rounds."""
    layer = next(m for m in reversed(list(denoiser.modules())) if isinstance(m, nn.Linear) and m.in_features >= 64)
    seen: list[Tensor] = []
    call = next(calib.calls())
    with layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach())), torch.no_grad():
        call.run(denoiser)
    x, scale = seen[0], torch.full((groups,), 0.05)
    index, edges = call.timestep.reshape(-1)[:1].float(), torch.linspace(0, 1000, groups - 1)

    def static() -> Tensor:
        return (x * (1 / scale[0])).round().clamp(-128, 127).to(torch.int8)

    def grouped() -> Tensor:
        s = scale.index_select(0, (index >= edges).sum().reshape(1))
        return (x * (1 / s)).round().clamp(-128, 127).to(torch.int8)

    def token() -> Tensor:
        s = x.abs().amax(-1, keepdim=True) / 127
        return (x * (1 / s)).round().clamp(-128, 127).to(torch.int8)

    times = compare_latency({"static": static, "grouped": grouped, "token": token}, rounds=101, warmup=10)
    return {name: time.median / times["static"].median for name, time in times.items()}


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Results of one model and seed; what the folder holds is not measured again."""
    pipe = load_pipeline(bundled(name))
    _, denoiser = denoiser_of(pipe)
    denoiser.eval().requires_grad_(False)
    options: dict[str, Any] = {"prompts": PROMPTS[name]} if name in PROMPTS else {}

    def recorded(first: int, images: int) -> CalibrationSet:
        sample = sampler(pipe, steps=args.steps, images=images, batch=4, seed=first, **options)
        return dq.record(denoiser, sample, args.out / f"{name}-calls-{first}", progress=False)

    calib, held = recorded(1000 * seed, args.images), recorded(HELD_OUT_SEED, args.held_out)
    folder = args.out / f"{name}-work-{seed}"
    folder.mkdir(exist_ok=True)
    rows = list(measure(denoiser, calib, held, args, seed, folder))
    return {"model": name, "seed": seed, "rows": rows, "cost": quantizing_cost(calib, denoiser, args.groups)}


def table(results: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Error relative to one static range, mean over seeds (smallest and largest)."""
    lines = ["| width | ranges | output error | over static | bytes | kept |", "|---|---|---|---|---|---|"]
    for bits in args.widths:
        for method in args.methods:
            rows = [each(r, bits, method) for r in results]
            ratios = [row["error"] / each(r, bits, "static")["error"] for row, r in zip(rows, results, strict=True)]
            kept = ", ".join(row["search"]["kept"] for row in rows) if method == "search" else ""
            mean = statistics.mean(row["error"] for row in rows)
            spread = f"{statistics.mean(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
            lines.append(f"| A{bits} | {method} | {mean:.3g} | {spread} | {rows[0]['bytes']} | {kept} |")
    return "\n".join(lines)


def each(result: dict[str, Any], bits: int, method: str) -> dict[str, Any]:
    """The row of a width and a method."""
    return next(row for row in result["rows"] if (row["bits"], row["method"]) == (bits, method))


def plot(found: dict[str, list[dict[str, Any]]], args: argparse.Namespace, file: Path) -> None:
    """Output error by method, one panel for each model, one mark for each width; bars span the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(5.5 * len(found), 3.6), squeeze=False)
    for axis, (name, results) in zip(axes[0], found.items(), strict=True):
        for bits in args.widths:
            errors = [[each(r, bits, m)["error"] for r in results] for m in args.methods]
            middle = [statistics.mean(e) for e in errors]
            spans = [[m - min(e), max(e) - m] for m, e in zip(middle, errors, strict=True)]
            axis.errorbar(
                args.methods, middle, yerr=list(zip(*spans, strict=True)), fmt="o", capsize=3, label=f"W8A{bits}"
            )
        axis.set(title=name, yscale="log", ylabel="relative output error, held out")
        axis.tick_params(axis="x", rotation=30)
        axis.grid(axis="y", alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["digits", "emoji"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=8, help="calibrated on")
    parser.add_argument("--held-out", type=int, default=4, help="images measured on")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8, help="of the search")
    parser.add_argument("--out", type=Path, default=Path("adp-report"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = {name: [run(name, seed, args) for seed in range(args.seeds)] for name in args.models}
    for name, results in found.items():
        cost = {k: statistics.median(r["cost"][k] for r in results) for k in results[0]["cost"]}
        print(f"\n{name}: quantizing one layer's input, eager, over a static range: "
              f"{cost['grouped']:.2f}x with {args.groups} groups, {cost['token']:.2f}x per token\n")  # fmt: skip
        print(table(results, args))
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "models", "seeds")}
        for result in results:
            Records(f"adp-{name}", settings).put(f"seed {result['seed']}", result)
    plot(found, args, args.out / "adp.png")
    print(f"\nplot in {args.out / 'adp.png'}; compiled latency of whole denoisers: python -m benchmarks.latency")


if __name__ == "__main__":
    main()
