"""See `benchmarks.peers`. Started again, it goes on where it was stopped. One table and plot for a model and widths;
on request the images that they are of, too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file

import dq_plugins as dq
from benchmarks.peers import NAMES, WIDTHS, Method
from benchmarks.peers.comparison import feature_distance, paired_interval, psnr
from benchmarks.peers.environment import interpreter
from benchmarks.peers.worker import BATCH, Job, drawn
from benchmarks.records import RESULTS, Records
from benchmarks.tfmq import MODELS, Case, usual_steps
from dq_plugins.plots import pairs_of_images
from dq_plugins.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASES = ("ours, default", "ours, mixed-precision")  # what others are compared with image by image: the first that ran
COLUMNS = (
    "method", "runs", "n", "PSNR dB", "worst", "features", "less than {}: dB (95 %)", "SQNR dB",
    "worst step", "MB", "quantization / sampling", "peak MB", "call CPU ms",
)  # fmt: skip
SHOWN = 8  # images of a picture


class Bench:
    """One denoiser: what is recorded of it, and its images in full precision."""

    def __init__(self, model: str, images: int, folder: Path) -> None:
        self.images, self.folder = images, folder / model
        self.case = Case(model, usual_steps(model), self.folder / "calls")
        self.drawn: dict[int, np.ndarray] = {}

    def recorded(self, noise: int, images: int) -> str:
        """Folder of recorded calls."""
        out = self.case.folder / str(noise)
        dq.record(self.case.denoiser, self.case.sampler(images, noise, BATCH), out, progress=False)
        return str(out)

    def reference(self, noise: int) -> np.ndarray:
        """Full precision's images."""
        if noise not in self.drawn:
            self.drawn[noise] = drawn(self.case, self.case.denoiser, noise, self.images)
        return self.drawn[noise]

    def sampling_seconds(self) -> float:
        """Processor time of sampling as many images as a method is calibrated on."""
        began = time.process_time()
        drawn(self.case, self.case.denoiser, 0, 8)
        return time.process_time() - began

    def run(self, peer: str, method: str, label: str, seed: int) -> dict[str, Any]:
        """Measurements of one method, or why it did not run."""
        noise, folder = _noise(seed), self._place(method, label, seed)
        folder.mkdir(parents=True, exist_ok=True)
        calibration, judged = self.recorded(100 * seed, 8), self.recorded(noise, BATCH)
        job = Job(
            peer, method, self.case.name, self.case.steps, WIDTHS[label], seed, calibration, judged, noise, self.images
        )
        job.write(folder / "job.json")
        try:
            python = interpreter(peer, importlib.import_module(f"benchmarks.peers.{peer}").REQUIREMENTS)
        except RuntimeError as error:
            return {"failed": str(error)}
        command = [str(python), "-m", "benchmarks.peers.worker", str(folder / "job.json")]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            return {"failed": done.stderr.strip().splitlines()[-1][:300]}
        images = load_file(folder / "images.safetensors")["images"].numpy()
        measured = json.loads((folder / "measured.json").read_text())
        reference = self.reference(noise)
        return measured | {"psnr": psnr(images, reference), "features": feature_distance(images, reference)}

    def _place(self, method: str, label: str, seed: int) -> Path:
        """Folder of one run's images and measurements."""
        return self.folder / f"{method}-{label}-{seed}".replace(" ", "-")

    def pictures(self, names: Iterable[str], label: str) -> Figure:
        """The first images of seed 0 by these methods."""
        files = {name: self._place(name, label, 0) / "images.safetensors" for name in names}
        return side_by_side(self.reference(_noise(0)), files)


def _noise(seed: int) -> int:
    """First seed of the noise that images are judged from."""
    return 10_000 * (seed + 1)


def methods(peers: list[str], label: str) -> Iterator[tuple[str, str, Method]]:
    """Peer, name and method of everything that has these widths."""
    for peer in peers:
        for name, method in importlib.import_module(f"benchmarks.peers.{peer}").METHODS.items():
            if label in method.widths:
                yield peer, name, method


def row(name: str, runs: str, found: list[dict[str, Any]], base: list[dict[str, Any]], sampling: float) -> list[Any]:
    """One line of the table: all seeds together."""
    every = [value for run in found for value in run["psnr"]]
    ours = [value for run in base for value in run["psnr"]]
    steps = [value for run in found for value in run["SQNR"].values()]
    mean, low, high = paired_interval(ours[: len(every)], every[: len(ours)])  # a row may have fewer seeds
    measured = {
        key: statistics.median(run[key] for run in found) for key in found[0] if isinstance(found[0][key], int | float)
    }
    return [
        name,
        runs,
        len(every),
        round(statistics.median(every), 2),
        round(min(every), 2),
        statistics.median(value for run in found for value in run["features"]),
        f"{mean:.2f} ({low:.2f} to {high:.2f})",
        round(statistics.median(steps), 2),
        round(min(steps), 2),
        round(measured["bytes"] / 1e6, 3),
        round(measured["quantization CPU s"] / sampling, 2),
        round(measured["quantization peak MB"]),
        round(measured["call CPU ms"], 1),
    ]


def plot(rows: list[list[Any]], title: str, file: Path) -> None:
    """PSNR against size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for name, *_ in rows:
        found = next(each for each in rows if each[0] == name)
        axis.plot(found[9], found[3], "*" if name.startswith("ours") else "o", markersize=9)
        axis.annotate(name, (found[9], found[3]), textcoords="offset points", xytext=(6, 3), fontsize=7)
    axis.set(title=title, xlabel="weights, MB", ylabel="PSNR to full precision, median, dB")
    axis.margins(0.2)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def side_by_side(reference: np.ndarray, files: Mapping[str, Path]) -> Figure:
    """First images ``[N, H, W, C]`` in [0, 1]: a row for full precision, one for every method whose file is there."""
    rows = {"full precision": reference[:SHOWN]}
    for name, file in files.items():
        if file.exists():
            rows[textwrap.fill(name, 18)] = load_file(file)["images"][:SHOWN].numpy()
    return pairs_of_images(rows, [f"noise {place}" for place in range(len(reference[:SHOWN]))])


def compare(bench: Bench, peers: list[str], label: str, seeds: int, only: list[str] | None, out: Path) -> list[str]:
    """All methods at some widths. Those that ``only`` does not name are taken from the record, if they are there.

    Returns the names of those that ran.
    """
    model = bench.case.name
    records = Records(f"peers-{model}-{label}", {"images": bench.images, "model": model, "widths": label}, out)
    sampling = records.get("sampling CPU s", bench.sampling_seconds)
    found: dict[str, list[dict[str, Any]]] = {}
    runs: dict[str, str] = {}
    for peer, name, method in methods(peers, label):
        mine = range(seeds)
        if only is not None and name not in only:  # its first seeds, as far as they are there
            mine = range(next((s for s in mine if f"{name}, {s}" not in records.data), seeds))
        if not mine:
            continue
        how = method.runs if WIDTHS[label][1] else "weight-only"
        runs[name] = how + (f"; {method.note}" if method.note else "")
        each = [records.get(f"{name}, {s}", partial(bench.run, peer, name, label, s)) for s in mine]
        failed = next((one["failed"] for one in each if "failed" in one), None)
        print(f"  {model} {label}, {name}: " + (failed or f"{statistics.median(each[0]['psnr']):.2f} dB"), flush=True)
        if not failed:
            found[name] = each
    base = next((name for name in BASES if name in found), None)
    if base is not None:
        rows = [row(name, runs[name], each, found[base], sampling) for name, each in found.items()]
        table = Table([heading.format(base) for heading in COLUMNS], rows)
        records.put("table", table.rows)
        plot(table.rows, f"{model}, {label}", out / f"peers-{model}-{label}.png")
        print(f"\n{model}, {label}, {bench.case.steps} steps\n\n{table}\n", flush=True)
    return list(found)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command's, checked."""
    import benchmarks.peers as described

    parser = argparse.ArgumentParser(
        description=described.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--widths", nargs="+", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--peers", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help='run these alone, such as "SDNQ, dynamic"')
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=16, help="judged for each seed")
    parser.add_argument("--work", type=Path, default=Path("peers-work"), help="folder of recorded calls and images")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--pictures", type=Path, help="folder for the first images of every method, side by side")
    args = parser.parse_args(given)
    known = list(dict.fromkeys(name for label in args.widths for _, name, _ in methods(args.peers, label)))
    if unknown := [name for name in args.only or () if name not in known]:
        asked, there = ", ".join(args.widths), "; ".join(known)
        parser.error(f"argument --only: no method {unknown[0]!r} has widths {asked}; known are: {there or 'none'}")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    for model in args.models:
        bench = Bench(model, args.images, args.work.resolve())
        for label in args.widths:
            names = compare(bench, args.peers, label, args.seeds, args.only, args.out)
            if args.pictures is not None:
                args.pictures.mkdir(parents=True, exist_ok=True)
                bench.pictures(names, label).savefig(args.pictures / f"pictures-{model}-{label}.png", dpi=100)


if __name__ == "__main__":
    sys.exit(main())
