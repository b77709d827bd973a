"""Linearised sensitivity against the naive measurement: rank correlation, denoiser calls, time; two workers and one.

    python -m benchmarks.mixdq_sensitivity [--model digits | emoji] [--workers 2]

The naive method repeats every recorded call once for each layer, operand and width. The linearised one takes a few
backward passes for all of them together, and measures some entries exactly to check and correct itself. A backward
pass counts as two calls. Both see the same calls and quantizers.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from benchmarks.mixdq_setting import Setting, arguments, prepare
from benchmarks.records import Records
from dq_plugins.progress import finish
from dq_plugins.quantized.candidates import Entry
from dq_plugins.sensitivity.exact_noise import ExactContent, ExactQuality
from dq_plugins.sensitivity.measure import measure
from dq_plugins.sensitivity.probes import ContentProbes, QualityProbes
from dq_plugins.sensitivity.sensitivity_table import SensitivityTable, cost, entries_to_check, relative

DRAWS, CHECKED, CONTENT_PROBES = 160, 32, 2
"""The defaults of the pass ``sensitivity``."""


def timed(measurement: Any, **options: Any) -> tuple[dict, float]:
    """Results of a measurement and its wall time."""
    began = time.perf_counter()
    return finish(measure(measurement, **options)), time.perf_counter() - began


def by_side(estimate: Mapping[Entry, float], exact: Mapping[Entry, float]) -> dict[str, float]:
    """Rank correlation over all entries, and over those of each operand."""
    parts = {"all": list(exact), **{s: [e for e in exact if e.operand == s] for s in ("weight", "activation")}}
    return {n: spearmanr([estimate[e] for e in part], [exact[e] for e in part]).statistic for n, part in parts.items()}


def quality(setting: Setting) -> dict[str, Any]:
    """Noise power of the output."""
    calls = setting.calibration.subset(per_timestep=2)
    naive, naive_time = timed(ExactQuality(setting.denoiser, setting.candidates, calls))
    exact = relative(naive, setting.candidates)
    probes = QualityProbes(setting.denoiser, setting.candidates, calls, -(-DRAWS // len(calls)))
    found, fast_time = timed(probes)
    table = SensitivityTable(relative(found, setting.candidates), calls=cost(found))
    chosen = entries_to_check(table, CHECKED)
    sample = ExactQuality(
        setting.denoiser, setting.candidates.subset(chosen), setting.calibration.subset(per_timestep=1)
    )
    checked, check_time = timed(sample)
    corrected = table.corrected(relative(checked, setting.candidates.subset(chosen)), cost(checked))
    assert corrected.check is not None
    return {
        "entries": len(exact),
        "recorded calls": len(calls),
        "calls": {"naive": cost(naive), "linearised": corrected.calls},
        "calls, linearised / naive": corrected.calls / cost(naive),
        "seconds": {"naive": naive_time, "linearised": fast_time + check_time},
        "rank correlation with the naive measure": by_side(corrected.noise, exact),
        "the check by itself": vars(corrected.check),
    }


def content(setting: Setting) -> dict[str, Any]:
    """Similarity of the final samples."""
    runs = setting.trajectories()[:1]
    naive, naive_time = timed(ExactContent(setting.denoiser, setting.candidates, runs))
    exact = relative(naive, setting.candidates)
    found, fast_time = timed(ContentProbes(setting.denoiser, setting.candidates, runs, CONTENT_PROBES))
    structure, texture = (relative(found, setting.candidates, f"#{part}") for part in ("structure", "texture"))
    return {
        "entries": len(exact),
        "steps": runs[0].steps,
        "images": runs[0].images,
        "share of the sampler's movement left unexplained": runs[0].unexplained,
        "calls": {"naive": cost(naive), "linearised": cost(found)},
        "calls, linearised / naive": cost(found) / cost(naive),
        "seconds": {"naive": naive_time, "linearised": fast_time},
        "rank correlation with 1 - SSIM": by_side({e: structure[e] + texture[e] for e in exact}, exact),
    }


def workers(setting: Setting, count: int) -> dict[str, float]:
    """The naive measurement in one process and in several, processes started before the clock."""
    from joblib import Parallel, delayed

    chosen = setting.candidates.entries()[:: max(len(setting.candidates.entries()) // 60, 1)]
    work = ExactQuality(setting.denoiser, setting.candidates.subset(chosen), setting.calibration.subset(per_timestep=1))
    torch.set_num_threads(1)
    _, alone = timed(work)
    Parallel(n_jobs=count)(delayed(work)(unit) for unit in work.units()[:count])  # joblib keeps the processes
    _, together = timed(work, workers=count)
    return {"entries": len(chosen), "1 worker": alone, f"{count} workers": together, "speed-up": alone / together}


def main() -> None:
    """Record, then measure both ways."""
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=["quality", "content", "workers"])
    args = parser.parse_args()
    settings = {k: v for k, v in vars(args).items() if k != "parts"}
    records = Records(f"mixdq_sensitivity-{args.model}", settings)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(args.model, Path(folder), args.steps)
        print(f"{args.model}: {len(setting.candidates.layers)} layers")
        parts = {"quality": quality, "content": content, "workers": partial(workers, count=args.workers)}
        for part in args.parts:
            print(part, json.dumps(records.get(part, partial(parts[part], setting)), indent=1), flush=True)


if __name__ == "__main__":
    main()
