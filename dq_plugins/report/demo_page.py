"""The page of the demo: what quantization did to the pictures, the error, the size and the speed."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dq_plugins.metrics.latency import Latency
from dq_plugins.plan import ActivationQuant, QuantPlan
from dq_plugins.plots import activation_ranges, lines, pairs_of_images
from dq_plugins.report.execution import LayerExecution, execution_table, layer_table
from dq_plugins.report.page import Page
from dq_plugins.report.plan_page import add_decisions
from dq_plugins.report.table import Table

Ranges = Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo measured.

    Attributes:
        plan: the plan.
        images: label (``"fp32"``, ``"W8A8"``) -> images ``[H, W, C]`` or ``[H, W]`` in [0, 1], same seeds.
        titles: what each image shows.
        psnr: PSNR in dB of every quantized image to its full-precision one.
        sqnr: output SQNR in dB by timestep, on held-out calls.
        bytes: label -> size of the checkpoint in bytes.
        latency: label -> time of one denoiser call.
        executions: how each layer runs.
        ranges: layer -> (timesteps, minima, maxima) of its input.
    """

    plan: QuantPlan
    images: Mapping[str, Sequence[Any]]
    titles: Sequence[str]
    psnr: Sequence[float]
    sqnr: Mapping[float, float]
    bytes: Mapping[str, int]
    latency: Mapping[str, Latency]
    executions: Mapping[str, LayerExecution]
    ranges: Ranges


def summary_table(result: DemoResult) -> Table:
    """The figures in one table."""
    finite = [v for v in result.sqnr.values() if math.isfinite(v)]
    first, *rest = result.bytes
    rows: list[list[str]] = [
        ["output SQNR per step, median (worst)", f"{statistics.median(finite):.1f} dB ({min(finite):.1f} dB)"],
        ["image PSNR to full precision, median", f"{statistics.median(result.psnr):.1f} dB"],
    ]
    for name in rest:
        ratio = result.bytes[first] / result.bytes[name]
        rows.append(
            [
                f"size on disk, {first} -> {name}",
                f"{_mb(result.bytes[first])} -> {_mb(result.bytes[name])} ({ratio:.2f}x)",
            ]
        )
    for mode in ("eager", "compiled"):
        pair = [result.latency.get(f"{label}, {mode}") for label in ("fp32", "int8")]
        if pair[0] and pair[1]:
            ratio = pair[0].median / pair[1].median
            rows.append([f"denoiser call, {mode}, fp32 -> int8", f"{pair[0]} -> {pair[1]} ({ratio:.2f}x faster)"])
    states = Counter(e.state for e in result.executions.values())
    rows.append(["layers", ", ".join(f"{n} {state}" for state, n in states.most_common())])
    return Table(["measured", "value"], rows)


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def demo_page(result: DemoResult) -> Page:
    """The page."""
    page = Page(f"{result.plan.model}: full precision and quantized, side by side")
    page.table(summary_table(result))
    page.note(
        "Same weights, prompts and seeds. Latency is the median of interleaved calls (quartiles) on this machine; the "
        "ratio is what carries over. Error per step is measured on recorded full-precision calls that the ranges were "
        "not chosen on."
    )
    page.heading("Images")
    page.figure(pairs_of_images(result.images, result.titles), "Same seeds, sampled with each denoiser.")
    page.heading("Error per timestep")
    page.figure(lines({"int8": (list(result.sqnr), list(result.sqnr.values()))}, "timestep t", "output SQNR (dB)"), "")
    page.heading("Activation range over the timestep")
    plan = result.plan
    tables = {name: plan.layers[name].activation for name in result.ranges}
    edges = {name: plan.groups[a.groups].edges for name, a in tables.items() if isinstance(a, ActivationQuant)}
    page.figure(activation_ranges(result.ranges, edges), "Smallest and largest input of the layers that move most.")
    page.heading("How the layers run")
    page.table(execution_table(result.executions))
    page.table(layer_table(result.executions), folded="every layer")
    add_decisions(page, plan)
    return page
