"""What timestep groups do to the error of activations, layer by layer, on all values and on samples not calibrated on.

    python -m benchmarks.timestep_groups [--model examples/denoisers/digits] [--groups 8] [--asymmetric]

One recording is calibrated on, a second one with other seeds is not. For every linear layer and convolution the squared
error of its quantized input is measured with the quantizer that executes, on every value (not on the histograms that
ranges were chosen from), and compared with one static range chosen from the same candidates. Then: time and memory.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from dq_diffusers.recording import denoiser_of, load_pipeline, sampler
from torch import Tensor, nn

from benchmarks.records import Records
from dq_plugins.affine import affine_parameters, fake_quantize, integer_range
from dq_plugins.calibration import CalibrationSet, record
from dq_plugins.observers import ErrorTable, optimal_groups, uniform_groups
from dq_plugins.observers.grouping import best_candidates
from dq_plugins.observers.streaming import stream_inputs
from dq_plugins.quantized.statistics import Statistics, collect
from dq_plugins.report import Table
from dq_plugins.timesteps import TimestepGroups

Quantizers = dict[str, tuple[TimestepGroups, Tensor, Tensor]]  # by layer: groups, scale [G], zero point [G]
MOVES = 1.05  # a layer's range moves when its largest absolute value differs by more than this between timesteps


def quantizers(
    tables: Mapping[str, ErrorTable], groups: TimestepGroups, timesteps: Sequence[float], bits: int, symmetric: bool
) -> Quantizers:
    """The best candidate of every layer in every group."""
    membership = torch.tensor([groups.of(t) for t in timesteps])
    found = {}
    for layer, table in tables.items():
        best = best_candidates(table, membership, len(groups))
        found[layer] = (groups, *affine_parameters(table.low[best], table.high[best], bits, symmetric=symmetric))
    return found


def real_errors(
    denoiser: nn.Module, calib: CalibrationSet, variants: Mapping[str, Quantizers], bits: int
) -> dict[str, dict[str, float]]:
    """Summed squared error of every layer's input, by variant and layer, over all values of all calls."""
    q_min, q_max = integer_range(bits)
    layers = list(next(iter(variants.values())))
    total = {name: dict.fromkeys(layers, 0.0) for name in variants}

    def receive(layer: str, x: Tensor, timestep: float) -> None:
        for name, chosen in variants.items():
            groups, scale, zero = chosen[layer]
            g = groups.of(timestep)
            error = fake_quantize(x, scale[g], zero[g], q_min, q_max) - x
            total[name][layer] += float(error.double().square().sum())

    for _ in stream_inputs(denoiser, calib, layers, receive):
        pass
    return total


def moving_layers(statistics: Statistics, layers: Sequence[str]) -> set[str]:
    """Layers whose largest absolute value changes with the timestep."""
    found = set()
    for layer in layers:
        top = torch.maximum(-statistics.low(layer), statistics.high(layer))
        if float(top.max()) > MOVES * float(top.min()):
            found.add(layer)
    return found


def compared(
    name: str, errors: dict[str, dict[str, float]], moving: set[str], power: dict[str, float]
) -> dict[str, float]:
    """How the layers of a variant compare with one static range."""
    summed = {variant: sum(errors[variant][k] / power[k] for k in power) for variant in (name, "static")}
    ratios = {k: errors[name][k] / e for k, e in errors["static"].items() if e > 0}
    moved = [r for k, r in ratios.items() if k in moving]
    return {
        "sum": summed[name] / summed["static"],
        "median": statistics.median(moved) if moved else float("nan"),
        "best": min(ratios.values()),
        "worst": max(ratios.values()),
        "fell": sum(r < 1 for r in moved),
        "of": len(moved),
        "rose": sum(r > 1 for r in ratios.values()),
        "of all": len(ratios),
    }


def peak_mb() -> float:
    """High-water mark of the resident set, in MB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def variants_at(statistics: Statistics, bits: int, groups: int, symmetric: bool) -> dict[str, Quantizers]:
    """One static range, uniform and optimal groups, and a group for each timestep; prints what finding them took."""
    begun = time.process_time()
    tables = statistics.error_tables(bits, symmetric=symmetric)
    tabled = time.process_time()
    grouping = optimal_groups(tables, statistics.timesteps)
    solved = time.process_time()
    kinds = {
        "static": grouping.groups(1),
        f"uniform {groups}": uniform_groups(statistics.timesteps, groups),
        f"optimal {groups}": grouping.groups(groups),
        "one each": grouping.groups(len(statistics.timesteps)),
    }
    candidates = sum(table.low.numel() for table in tables.values()) // len(tables)
    print(f"<!-- A{bits}: {candidates} candidates a layer, error tables {tabled - begun:.2f} s, dynamic program "
          f"{solved - tabled:.2f} s of processor time -->")  # fmt: skip
    return {name: quantizers(tables, g, statistics.timesteps, bits, symmetric) for name, g in kinds.items()}


def compare(denoiser: nn.Module, calib: CalibrationSet, held: CalibrationSet, args: argparse.Namespace) -> Table:
    """What statistics cost, printed, and the errors."""
    layers = [n for n, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    begun, before = time.process_time(), peak_mb()
    collected = collect(denoiser, calib, layers)
    spent, grown = time.process_time() - begun, peak_mb() - before
    print(f"{len(layers)} layers, {len(calib.timesteps)} timesteps, {len(calib)} calls: statistics took {spent:.1f} s")
    print(f"of processor time and {grown:.0f} MB more memory.\n")
    moving = moving_layers(collected, layers)
    power = {layer: float((collected.mean_square(layer) * collected.count(layer)).sum()) for layer in layers}
    rows = []
    for bits in (8, 6, 4):
        variants = variants_at(collected, bits, args.groups, not args.asymmetric)
        for data, recording in (("calibrated", calib), ("held out", held)):
            errors = real_errors(denoiser, recording, variants, bits)
            rows += [[f"A{bits}", data, n, *compared(n, errors, moving, power).values()] for n in list(variants)[1:]]
    columns = ["sum", "median", "best", "worst", "fell", "of", "rose", "of all"]
    return Table(["width", "data", "groups", *columns], rows)


def main() -> None:
    """Record twice, calibrate on one, measure on both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent.parent / "examples/denoisers/digits"))
    parser.add_argument("--prompts", nargs="+")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--asymmetric", action="store_true")
    args = parser.parse_args()
    pipe = load_pipeline(args.model)
    _, denoiser = denoiser_of(pipe)
    options = {"prompts": args.prompts, "steps": args.steps, "images": args.images}
    with tempfile.TemporaryDirectory() as folder:
        calib, held = (
            record(denoiser, sampler(pipe, seed=seed, **options), Path(folder) / str(seed), progress=False)
            for seed in (0, 10_000)
        )
        found = compare(denoiser, calib, held, args)
    print("Error over that of one static range: of the sum over layers, each relative to its signal power (which is")
    print("what the groups minimise); median over the layers that move; best and worst over all layers. 'fell' counts")
    print(f"layers that move, 'rose' all.\n\n{found}")
    kind = "-asymmetric" if args.asymmetric else ""
    Records(f"timestep_groups-{Path(args.model).name}{kind}", vars(args)).put("rows", found.rows)


if __name__ == "__main__":
    main()
