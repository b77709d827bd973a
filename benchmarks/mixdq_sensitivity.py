"""Linearised sensitivity against the naive measurement: rank correlation, denoiser calls, time; two workers and one.

    python -m benchmarks.mixdq_sensitivity [--model digits | emoji] [--workers 2]

The naive method repeats every recorded call once for each layer, side and width. The linearised one takes a few
backward passes for all of them together, and measures some entries exactly to check and correct itself. A backward
pass counts as two calls. Both see the same calls and quantizers.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.mixdq_setting import Setting, arguments, prepare
from dq_plugins.sensitivity import (
    ContentProbes,
    Entry,
    ExactContent,
    ExactQuality,
    QualityProbes,
    SensitivityTable,
    measure,
)
from dq_plugins.sensitivity.measure import finish
from dq_plugins.sensitivity.table import cost, entries_to_check, relative, spearman

DRAWS, CHECKED, CONTENT_PROBES = 160, 32, 2
"""The defaults of the pass ``sensitivity``."""


def timed(measurement: Any, **options: Any) -> tuple[dict, float]:
    """Results of a measurement and its wall time."""
    began = time.perf_counter()
    return finish(measure(measurement, **options)), time.perf_counter() - began


def by_side(estimate: Mapping[Entry, float], exact: Mapping[Entry, float]) -> str:
    """Rank correlation over all entries, and over those of each side."""
    parts = {"all": list(exact), **{s: [e for e in exact if e.side == s] for s in ("weight", "activation")}}
    values = {n: spearman([estimate[e] for e in part], [exact[e] for e in part]) for n, part in parts.items()}
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def quality(setting: Setting) -> None:
    """Noise power of the output."""
    calls = setting.calibration.subset(per_timestep=2)
    naive, naive_time = timed(ExactQuality(setting.denoiser, setting.candidates, calls))
    exact = relative(naive, setting.candidates)
    probes = QualityProbes(setting.denoiser, setting.candidates, calls, -(-DRAWS // len(calls)))
    found, fast_time = timed(probes)
    table = SensitivityTable(relative(found, setting.candidates), calls=cost(found))
    chosen = entries_to_check(table, CHECKED)
    sample = ExactQuality(setting.denoiser, setting.candidates, setting.calibration.subset(per_timestep=1), chosen)
    checked, check_time = timed(sample)
    corrected = table.corrected(relative(checked, setting.candidates.subset(chosen)), cost(checked))
    print(f"quality: {len(exact)} entries, {len(calls)} recorded calls")
    print(f"  naive      {cost(naive):8.0f} denoiser calls, {naive_time:7.1f} s")
    print(f"  linearised {corrected.calls:8.0f} denoiser calls, {fast_time + check_time:7.1f} s")
    print(f"  calls, linearised / naive: {corrected.calls / cost(naive):.3f}")
    print(f"  rank correlation with the naive measure: {by_side(corrected.noise, exact)}")
    assert corrected.check is not None
    print(f"  the check by itself said {corrected.check.rank_correlation:.3f} over {corrected.check.entries} entries")


def content(setting: Setting) -> None:
    """Similarity of the final samples."""
    runs = setting.trajectories()[:1]
    naive, naive_time = timed(ExactContent(setting.denoiser, setting.candidates, runs))
    exact = relative(naive, setting.candidates)
    found, fast_time = timed(ContentProbes(setting.denoiser, setting.candidates, runs, CONTENT_PROBES))
    structure, texture = (relative(found, setting.candidates, f"#{part}") for part in ("structure", "texture"))
    print(f"content: {len(exact)} entries, one run of {runs[0].steps} steps, {runs[0].images} images")
    print(f"  of the sampler's movement the recording leaves unexplained: {runs[0].unexplained:.2%}")
    print(f"  naive      {cost(naive):8.0f} denoiser calls, {naive_time:7.1f} s")
    print(f"  linearised {cost(found):8.0f} denoiser calls, {fast_time:7.1f} s")
    print(f"  calls, linearised / naive: {cost(found) / cost(naive):.3f}")
    print(f"  rank correlation with 1 - SSIM: {by_side({e: structure[e] + texture[e] for e in exact}, exact)}")


def workers(setting: Setting, count: int) -> None:
    """The naive measurement in one process and in several, processes started before the clock."""
    from joblib import Parallel, delayed

    chosen = setting.candidates.entries()[:: max(len(setting.candidates.entries()) // 60, 1)]
    work = ExactQuality(setting.denoiser, setting.candidates, setting.calibration.subset(per_timestep=1), chosen)
    torch.set_num_threads(1)
    _, alone = timed(work)
    Parallel(n_jobs=count)(delayed(work)(unit) for unit in work.units()[:count])  # joblib keeps the processes
    _, together = timed(work, workers=count)
    print(f"workers: {len(chosen)} entries, 1 worker {alone:.1f} s, {count} workers {together:.1f} s")
    print(f"  speed-up {alone / together:.2f}x")


def main() -> None:
    """Record, then measure both ways."""
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(args.model, Path(folder), args.steps)
        print(f"{args.model}: {len(setting.candidates.layers)} layers")
        quality(setting)
        content(setting)
        workers(setting, args.workers)


if __name__ == "__main__":
    main()
