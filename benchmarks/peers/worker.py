"""One method of one peer, in its environment: ``python -m benchmarks.peers.worker JOB.json``.

Reads the job and the recorded calls that it names; writes ``images.safetensors`` and ``measured.json`` beside it.
"""

from __future__ import annotations

import importlib
import json
import resource
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.peers import Setting, Widths
from benchmarks.tfmq import Case
from dq_plugins.calibration import CalibrationSet
from dq_plugins.calibration.call import first_tensor

BATCH = 4  # of recorded and of judged calls: exported graphs have one size
TIMED_CALLS = 12


@dataclass(frozen=True)
class Job:
    """What a worker does.

    Attributes:
        peer: module of `benchmarks.peers`.
        method: key of its ``METHODS``.
        model: bundled denoiser or ``"terrain"``.
        steps: of sampling.
        widths: that are asked for.
        seed: of the method.
        calibration: folder of the recorded calls to calibrate on.
        judged: folder of recorded calls of other noise, for the error of every step.
        noise: seed of the first image.
        images: to draw.
    """

    peer: str
    method: str
    model: str
    steps: int
    widths: Widths
    seed: int
    calibration: str
    judged: str
    noise: int
    images: int

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> Job:
        """From JSON."""
        data = json.loads(path.read_text())
        return cls(**data | {"widths": tuple(data["widths"])})


def peak_mb() -> float:
    """High-water mark of the resident set (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def drawn(case: Case, denoiser: nn.Module, noise: int, images: int) -> np.ndarray:
    """Images ``[N, H, W, C]`` in [0, 1]."""
    return np.concatenate([np.asarray(out.images) for out in case.sampler(images, noise, BATCH)(denoiser)])


@torch.no_grad()
def step_errors(denoiser: nn.Module, calls: CalibrationSet) -> dict[str, float]:
    """SQNR in dB of the output by timestep, on full precision's own trajectory."""
    signal: dict[float, float] = {}
    noise: dict[float, float] = {}
    for call in calls.calls():
        t = float(call.timestep.flatten()[0])
        error = (first_tensor(denoiser(**call.kwargs)) - call.output).double().square().sum()
        signal[t] = signal.get(t, 0.0) + float(call.output.double().square().sum())
        noise[t] = noise.get(t, 0.0) + float(error)
    return {f"{t:g}": float(10 * np.log10(signal[t] / max(noise[t], 1e-30))) for t in sorted(signal, reverse=True)}


@torch.no_grad()
def call_ms(denoiser: nn.Module, calls: CalibrationSet) -> float:
    """Median processor time of one call, over all threads: other programs disturb it little."""
    taken = []
    for call in [*calls.calls()][:TIMED_CALLS]:
        began = time.process_time()
        denoiser(**call.kwargs)
        taken.append(1000 * (time.process_time() - began))
    return statistics.median(taken[2:])


def work(job: Job, folder: Path) -> dict[str, Any]:
    """Quantize, measure, draw."""
    torch.manual_seed(job.seed)
    case = Case(job.model, job.steps, folder)
    method = importlib.import_module(f"benchmarks.peers.{job.peer}").METHODS[job.method]
    setting = Setting(case.denoiser, CalibrationSet.open(job.calibration), job.widths, job.seed)
    before, began = peak_mb(), time.process_time()
    quantized = method.quantize(setting)
    seconds, peak = time.process_time() - began, peak_mb() - before
    judged = CalibrationSet.open(job.judged)
    images = drawn(case, quantized.denoiser, job.noise, job.images)
    save_file({"images": torch.from_numpy(np.ascontiguousarray(images))}, folder / "images.safetensors")
    return {
        "bytes": quantized.bytes,
        "quantization CPU s": seconds,
        "quantization peak MB": peak,
        "call CPU ms": call_ms(quantized.denoiser, judged),
        "SQNR": step_errors(quantized.denoiser, judged),
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    measured = work(Job.read(path), path.parent)
    (path.parent / "measured.json").write_text(json.dumps(measured, indent=1))
