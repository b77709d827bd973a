"""What a temporal table takes out of a denoiser: parameters, bytes, and time per step.

    python -m benchmarks.temporal_table                     # bundled denoisers
    python -m benchmarks.temporal_table --full-size         # also SD-1.5-size U-Net and DiT-XL/2 (4 GB of memory)

Full-size denoisers are built from their configs with random weights: cost does not depend on the weights' values.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dq_plugins as dq
from benchmarks.records import RESULTS, Records
from dq_plugins.bundled_denoisers import NAMES, bundled
from dq_plugins.recipe import Recipe, Step
from dq_plugins.report import Table

TABLE = Recipe("temporal-table", "nothing but the table", (Step("temporal-table"),))
SD15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
DIT_XL: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A denoiser and the arguments of one call with two samples, as guidance makes it."""
    if name in NAMES:
        adapter = dq.get("adapter", "diffusers")()
        denoiser = adapter.denoiser_of(adapter.load_pipeline(bundled(name)))[1]
        return denoiser, adapter.example_inputs(denoiser)
    import diffusers

    torch.manual_seed(0)
    if name == "SD-1.5 size":
        unet = diffusers.UNet2DConditionModel(**SD15)
        inputs = {"sample": torch.randn(2, 4, 32, 32), "encoder_hidden_states": torch.randn(2, 77, 768)}
        return unet, inputs | {"timestep": torch.tensor(501)}
    dit = diffusers.DiTTransformer2DModel(**DIT_XL)
    inputs = {"hidden_states": torch.randn(2, 4, 32, 32), "class_labels": torch.tensor([1, 1000])}
    return dit, inputs | {"timestep": torch.tensor([501, 501])}


def materialise(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with values instead of meta tensors."""

    def one(value: Any) -> Any:
        if not torch.is_tensor(value) or value.device.type != "meta":
            return value
        return torch.randn(value.shape) if value.is_floating_point() else torch.ones(value.shape, dtype=value.dtype)

    return {name: one(value) for name, value in inputs.items()}


def cpu_seconds(denoiser: nn.Module, inputs: dict[str, Any], rounds: int) -> list[float]:
    """CPU time of some calls after one to warm up. Other programs on the machine disturb it little."""
    taken = []
    for _ in range(rounds + 1):
        began = time.process_time()
        denoiser(**inputs)
        taken.append(time.process_time() - began)
    return taken[1:]


@torch.no_grad()
def measure(name: str, rounds: int) -> dict[str, float]:
    denoiser, inputs = build(name)
    denoiser.eval().requires_grad_(False)
    inputs = materialise(inputs)
    part = dq.partition(denoiser, inputs)
    parameters = {n: sum(p.numel() for p in denoiser.get_submodule(n).parameters()) for n in part.temporal}
    rounds = 40 * rounds if name in NAMES else rounds  # a small denoiser's call takes milliseconds
    with tempfile.TemporaryDirectory() as folder:
        calibration = dq.record(denoiser, lambda d: d(**inputs), folder, progress=False)
        plan = dq.make_plan(denoiser, calibration, TABLE, progress=False)
    live = cpu_seconds(denoiser, inputs, rounds)
    dq.apply(denoiser, plan, backend="simulate", inplace=True)
    looked_up = cpu_seconds(denoiser, inputs, rounds)
    return {
        "parameters": part.total_params,
        "t alone": sum(parameters.values()),
        "live CPU ms": 1000 * statistics.median(live),
        "table CPU ms": 1000 * statistics.median(looked_up),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    names = [*NAMES, *(("SD-1.5 size", "DiT-XL/2") if args.full_size else ())]
    settings = {"rounds": args.rounds, "threads": torch.get_num_threads()}
    records = Records("temporal_table", settings, args.out)
    found = {name: records.get(name, partial(measure, name, args.rounds)) for name in names}
    rows = []
    for name, v in found.items():
        total, alone = v["parameters"] / 1e6, v["t alone"] / 1e6
        live, looked_up = v["live CPU ms"], v["table CPU ms"]
        rows.append([name, total, alone, 4 * alone, live, looked_up, 100 * (1 - looked_up / live)])
    headings = ["denoiser", "M params", "M t alone (removed)", "MB removed, fp32"]
    print(Table([*headings, "CPU ms live", "CPU ms table", "% of step gained"], rows))


if __name__ == "__main__":
    main()
