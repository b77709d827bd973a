"""Latency, output error and memory of one denoiser step, ours beside what torchao has, in one interleaved run.

    python benchmarks/latency.py --model unet                  # eager
    python benchmarks/latency.py --model dit --compile         # compiled, inductor freezing on
    python benchmarks/latency.py --model dit --compile frozen whole regions   # every variant in three ways
    python benchmarks/latency.py --model unet --device cuda --compile
    python benchmarks/latency.py --model dit --only fp32 "W8A8, 8 groups (ours)" --json dit.json

Rounds are interleaved, so that a machine that slows down slows all variants; quote ratios of one run, never of two.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dq_torchao.regions import compile_regions
from torch import Tensor, fx, nn
from torch._inductor import config as inductor_config

from benchmarks.models import MODELS, Model
from benchmarks.variants import CPU_ONLY, VARIANTS
from dq_plugins.metrics.latency import Clock, Latency, compare_latency, thread_clock, wall_clock
from dq_plugins.metrics.size import state_bytes

TEST_TIMESTEPS = (900, 500, 100)
COLUMNS = ("variant", "median ms (quartiles)", "against first", "first call s", "SQNR dB", "weights MB", "one call MB")


class Row(NamedTuple):
    """What is reported of one variant."""

    name: str
    latency: Latency
    ratio: float
    sqnr: float
    weights: float
    memory: float


def output(denoiser: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    result = denoiser(**inputs)
    return result if isinstance(result, Tensor) else result[0]


@torch.no_grad()
def sqnr(reference: list[Tensor], denoiser: Callable[..., Any], model: Model) -> float:
    """Over all test timesteps, in dB."""
    noise = signal = 0.0
    for y, t in zip(reference, TEST_TIMESTEPS, strict=True):
        signal += float(y.double().square().sum())
        noise += float((y - output(denoiser, model.inputs(t, t + 1))).double().square().sum())
    return 10 * torch.log10(torch.tensor(signal / max(noise, 1e-30))).item()


def memory_of(call: Callable[[], object], device: str) -> float:
    """Peak memory of one call above what was there before, in MB: allocator on a GPU, resident set on Linux."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # freed memory counts as resident until the system has it back
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _kilobytes(status, "VmRSS")
    call()
    return (_kilobytes(status, "VmHWM") - before) / 1024


def _kilobytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


def to_device(model: Model, device: str) -> Model:
    def inputs(t: float, seed: int = 0) -> dict[str, Tensor]:
        return {name: x.to(device) for name, x in model.inputs(t, seed).items()}

    return Model(model.denoiser.to(device), inputs)


def compile_parts(denoiser: nn.Module) -> nn.Module:
    """Regional compilation; an exported graph has no blocks."""
    if isinstance(denoiser, fx.GraphModule):
        raise ImportError("an exported graph has no blocks to compile one by one")
    if hasattr(denoiser, "around"):
        raise ImportError("blocks would run what was compiled for those of fp32, which are of the same class")
    compile_regions(getattr(denoiser, "denoiser", denoiser), dynamic=False)
    return denoiser


def compile_whole(denoiser: nn.Module) -> Callable[..., Any]:
    return torch.compile(denoiser, dynamic=False)


def compile_frozen(denoiser: nn.Module) -> Callable[..., Any]:
    return within(lambda: inductor_config.patch(freezing=True), compile_whole(denoiser))


COMPILE: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "": lambda denoiser: denoiser,
    "whole": compile_whole,
    "frozen": compile_frozen,
    "regions": compile_parts,
}
MODES = {
    "": "eager",
    "whole": "compiled",
    "frozen": "compiled with inductor's freezing",
    "regions": "compiled by regions",
}


def within(around: Callable[[], AbstractContextManager[Any]], run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` inside a context, the compilation of its first call, too."""

    def call(**inputs: Any) -> Any:
        with around():
            return run(**inputs)

    return call


def build(
    model: Model, names: list[str], modes: Sequence[str]
) -> tuple[dict[str, nn.Module], dict[str, Callable[..., Any]]]:
    """Every variant that can be built, in every mode, and what is called to run it."""
    denoisers, callables = {}, {}
    for name in names:
        try:
            built = VARIANTS[name](model)
            for mode in modes[:1] if getattr(built, "own_runtime", False) else modes:
                denoiser = built if mode is modes[0] else copy.deepcopy(built)
                run = denoiser if getattr(denoiser, "own_runtime", False) else COMPILE[mode](denoiser)
                around = getattr(denoiser, "around", None)
                label = f"{name}, {MODES[mode]}" if len(modes) > 1 else name
                denoisers[label], callables[label] = denoiser, run if around is None else within(around, run)
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        print(f"built {name}", flush=True)
    return denoisers, callables


@torch.no_grad()
def measure(
    model: Model, names: list[str], *, device: str, modes: Sequence[str], rounds: int, clock: Clock = wall_clock
) -> list[Row]:
    """Build and time the variants; the first is what the others are compared with."""
    reference = [output(model.denoiser, model.inputs(t, t + 1)) for t in TEST_TIMESTEPS]
    denoisers, callables = build(model, names, modes)
    inputs = [model.inputs(t, 0) for t in TEST_TIMESTEPS]
    turn = iter(range(10**9))

    def call(run: Callable[..., Any]) -> Callable[[], object]:
        return lambda: run(**inputs[next(turn) % len(inputs)])  # steps of different groups, as in sampling

    latencies = compare_latency({name: call(run) for name, run in callables.items()}, rounds=rounds, clock=clock)
    first = next(iter(latencies.values())).median
    return [
        Row(
            name,
            latencies[name],
            first / latencies[name].median,
            sqnr(reference, run, model),
            state_bytes(denoisers[name]) / 2**20,
            memory_of(call(run), device),
        )
        for name, run in callables.items()
    ]


def table(rows: list[Row]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = (row.name, str(row.latency), f"{row.ratio:.2f}x", f"{row.latency.first / 1e3:.1f}", f"{row.sqnr:.1f}")
        lines.append("| " + " | ".join((*cells, f"{row.weights:.0f}", f"{row.memory:.0f}")) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="unet")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--compile",
        nargs="*",
        metavar="MODE",
        choices=[mode for mode in COMPILE if mode],
        help="one or more of whole (torch.compile), frozen (with inductor's freezing; the default on a CPU), regions "
        "(repeated blocks one by one)",
    )
    parser.add_argument("--only", nargs="+", metavar="VARIANT", choices=list(VARIANTS), help="default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of the calling thread: on a busy machine")
    parser.add_argument("--threads", type=int, help="PyTorch threads; default: PyTorch's choice")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = to_device(MODELS[arguments.model](), arguments.device)
    names = arguments.only or [n for n in VARIANTS if arguments.device == "cpu" or n not in CPU_ONLY]
    usual = "frozen" if arguments.device == "cpu" else "whole"
    modes = [""] if arguments.compile is None else arguments.compile or [usual]
    # without caches: the first call compiles, whatever ran before
    with inductor_config.patch(force_disable_caches=True):
        options = {"device": arguments.device, "modes": modes, "rounds": arguments.rounds}
        clock = thread_clock(torch.device(arguments.device)) if arguments.cpu_time else wall_clock
        rows = measure(model, names, **options, clock=clock)
    parameters = sum(p.numel() for p in model.denoiser.parameters()) / 1e6
    mode = MODES[modes[0]] if len(modes) == 1 else "in several ways"
    print(
        f"\n{arguments.model}, {parameters:.0f} M parameters, {mode}, {arguments.device}, torch {torch.__version__}, ",
        end="",
    )
    print(f"{torch.get_num_threads()} threads, {arguments.rounds} interleaved rounds\n\n{table(rows)}")
    if arguments.json:
        data = [{**row._asdict(), "latency": vars(row.latency)} for row in rows]
        arguments.json.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
