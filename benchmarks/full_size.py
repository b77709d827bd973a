"""Peak memory and time of every stage of ``default`` on a U-Net of full size, with random weights.

    python -m benchmarks.full_size [--width 320] [--steps 2] [--latents 8] [--recipe default]

``--width 320`` is the U-Net of Stable Diffusion 1.5 (860 M parameters). Memory is what is the process's own (RssAnon of
Linux) beyond what it had before the denoiser was made: pages of mapped files, which the system takes back at will, are
not in it. It is sampled every few milliseconds.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from dq_diffusers.pipelines import PixelClassConditionalPipeline  # noqa: F401  imported before memory is counted

import dq_plugins as dq
from benchmarks.records import Records

STATUS = Path("/proc/self/status")


def anonymous_mb() -> float:
    """Memory of this process alone, in MB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1000


class Peak:
    """The largest `anonymous_mb` since the last `take`, less a base."""

    def __init__(self) -> None:
        self.base, self._peak, self._stop = anonymous_mb(), 0.0, threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, anonymous_mb())

    def take(self) -> float:
        """The peak so far, from now on anew."""
        found, self._peak = max(self._peak, anonymous_mb()), 0.0
        return found - self.base


class Stages(logging.Handler):
    """Time and peak memory of each pass, from what the recipe runner logs at its end."""

    def __init__(self, peak: Peak, found: dict[str, dict[str, float]], show: Any) -> None:
        super().__init__()
        self.peak, self.found, self.show, self.began = peak, found, show, time.perf_counter()

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and record.msg.startswith("pass "):
            self.done(str(record.args[0]))

    def done(self, stage: str) -> None:
        now = time.perf_counter()
        self.found[stage] = {"seconds": round(now - self.began, 1), "peak_mb": round(self.peak.take())}
        self.began = now
        self.show(f"{stage:20s} {self.found[stage]['seconds']:8.1f} s  peak {self.found[stage]['peak_mb']:7d} MB")


def unet(width: int) -> torch.nn.Module:
    """Stable Diffusion 1.5's U-Net at a width of 320, with random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    widths = (width, 2 * width, 4 * width, 4 * width)
    return UNet2DConditionModel(block_out_channels=widths, cross_attention_dim=768, attention_head_dim=8).eval()


def measured(width: int, steps: int, latents: int, batch: int, recipe: str) -> dict[str, Any]:
    """Record, plan and simulate one call; see the module."""
    peak = Peak()
    denoiser = unet(width).requires_grad_(False)
    weights = sum(p.numel() for p in denoiser.parameters()) * 4 / 1e6
    text = torch.randn(batch, 77, 768, generator=torch.Generator().manual_seed(1))

    def sample(model: torch.nn.Module) -> None:
        x = torch.randn(batch, 4, latents, latents, generator=torch.Generator().manual_seed(2))
        for t in torch.linspace(981, 1, steps):
            x = x - 0.1 * model(x, t, text).sample

    found: dict[str, dict[str, float]] = {}
    stages = Stages(peak, found, lambda line: print(line, flush=True))
    logger = logging.getLogger("dq_plugins.recipe.runner")
    logger.setLevel(logging.INFO)
    logger.addHandler(stages)
    print(f"weights {weights:.0f} MB", flush=True)
    stages.done("making the denoiser")
    with torch.no_grad():
        sample(denoiser)
    stages.done("one sampling run")
    with tempfile.TemporaryDirectory() as folder:
        calibration = dq.record(denoiser, sample, Path(folder) / "calib", progress=False)
        stages.done("record")
        plan = dq.make_plan(denoiser, calibration, recipe, workdir=Path(folder) / "work", progress=False)
        stages.done("end of the recipe")
        plan.save(Path(folder) / "plan")
        stages.done("save")
    logger.removeHandler(stages)
    largest = max(each["peak_mb"] for each in found.values())
    call = found["one sampling run"]["peak_mb"] - weights  # one batch, beside the weights
    quantized = sum(layer.quantized for layer in plan.layers.values())
    return {
        "parameters": round(weights / 4), "weights_mb": round(weights), "batch_mb": round(max(call, 0)),
        "peak_mb": largest, "peak_over_weights": round((largest - max(call, 0)) / weights, 3),
        "layers": quantized, "stages": found,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--latents", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--recipe", default="default")
    args = parser.parse_args()
    settings = vars(args) | {"threads": torch.get_num_threads()}
    records = Records(f"full_size-{args.width}-{args.recipe}", settings)
    found = records.get("run", lambda: measured(args.width, args.steps, args.latents, args.batch, args.recipe))
    print(f"peak {found['peak_mb']} MB: {found['peak_over_weights']:.2f} of the weights, beside one batch")


if __name__ == "__main__":
    main()
