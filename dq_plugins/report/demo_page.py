"""The page of the demo: what quantization did to the pictures, the error, the size and the speed."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dq_plugins.metrics.latency import Latency
from dq_plugins.plan import ActivationQuant, QuantPlan
from dq_plugins.plots import activation_ranges, lines
from dq_plugins.report.execution import LayerExecution, execution_table, layer_table
from dq_plugins.report.page import Page
from dq_plugins.report.pictures import Picture, differences
from dq_plugins.report.plan_page import add_decisions
from dq_plugins.report.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        drift: by timestep, the output over that part of its error which all images share, in dB.
        blocks: figure of the denoiser's blocks, if one can be drawn.
        facts: what was run, where and when, by name.
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
    drift: Mapping[float, float]
    blocks: Figure | None
    facts: Mapping[str, str]

    def _repr_html_(self) -> str:
        return summary_table(self)._repr_html_()


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
            gain = f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
            rows.append([f"denoiser call, {mode}, fp32 -> int8", f"{pair[0]} -> {pair[1]} ({gain})"])
    states = Counter(e.state for e in result.executions.values())
    rows.append(["layers", ", ".join(f"{n} {state}" for state, n in states.most_common())])
    return Table(["measured", "value"], rows)


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def demo_page(result: DemoResult) -> Page:
    """The page: what was run, the pictures, the figures, and below them what the plan decided."""
    plan = result.plan
    page = Page(f"{plan.model}: full precision and quantized, side by side")
    page.facts({**_widths(plan), **result.facts})
    page.table(summary_table(result))
    for text in doubts(result):
        page.warning(text)
    page.note(
        "Same weights, prompts and seeds on both sides. Times are medians of interleaved calls (quartiles in brackets) "
        "on this machine; only their ratio carries over to another one."
    )
    _add_pictures(page, result)
    page.heading("Error of one step")
    page.figure(_error_figure(result), ERROR_CAPTION)
    page.heading("Why timesteps are grouped")
    tables = {name: plan.layers[name].activation for name in result.ranges}
    edges = {name: plan.groups[a.groups].edges for name, a in tables.items() if isinstance(a, ActivationQuant)}
    page.figure(
        activation_ranges(result.ranges, edges),
        "The smallest and the largest input of the four layers whose inputs change most while a picture is made. "
        "Between two dashed lines all timesteps share one scale; without lines the scale is measured in every call. "
        "One scale for all would waste most of its codes.",
    )
    if result.blocks is not None:
        page.heading("What depends on what")
        page.figure(
            result.blocks,
            "The blocks of this denoiser, found by following its values, not by their names. Blue boxes see the "
            "timestep and nothing else: TFMQ-DM's temporal block, for which every input that will ever come is known.",
        )
    page.heading("How the layers run")
    page.table(execution_table(result.executions))
    page.table(layer_table(result.executions), folded="every layer (click a heading to sort)")
    add_decisions(page, plan)
    return page


ERROR_CAPTION = (
    "How large the error of a single step is, against the step's own output: 20 dB lower is a tenth of the size. Drift "
    "is the part that is the same in every picture, the mean error of a channel: a sampler adds it up step by step. "
    "What is left is noise, which mostly cancels. Measured on pictures that no range was chosen on."
)


def doubts(result: DemoResult) -> list[str]:
    """What makes the figures of a run doubtful, as sentences; mostly nothing."""
    times = {name: latency.median for name, latency in result.latency.items()}
    found = []
    for label in ("fp32", "int8"):
        eager, compiled = (times.get(f"{label}, {mode}") for mode in ("eager", "compiled"))
        if eager is not None and compiled is not None and compiled > eager:
            found.append(
                f"The compiled {label} denoiser was slower than the eager one ({compiled:.2f} ms against "
                f"{eager:.2f} ms). Denoisers this small do that, and so does a machine that is busy with other work: "
                "do not quote the compiled times of this run."
            )
    return found


def _widths(plan: QuantPlan) -> dict[str, str]:
    widths = Counter(layer.width for layer in plan.layers.values() if layer.quantized)
    groups = ", ".join(f"{len(g)}" if name == "default" else f"{len(g)} ({name})" for name, g in plan.groups.items())
    return {
        "recipe": plan.recipe,
        "widths": ", ".join(width for width, _ in widths.most_common(3)) or "full precision",
        "timestep groups": groups or "one",
        "sampling steps": str(len(plan.schedule)),
    }


def _add_pictures(page: Page, result: DemoResult) -> None:
    (first, reference), (second, images) = result.images.items()
    maps, gain = differences(reference, images)
    columns = {}
    for i, title in enumerate(result.titles):
        columns[f"{title} ({i + 1})" if result.titles.count(title) > 1 else title] = [
            Picture(reference[i], first),
            Picture(images[i], f"{second}, {result.psnr[i]:.1f} dB"),
            Picture(maps[i], f"difference, {gain} times"),
        ]
    page.heading("Pictures")
    page.pictures(
        columns,
        "Each column starts from the same noise. Below the pictures: peak signal-to-noise ratio to full precision; "
        f"above 40 dB most eyes see no difference. The difference is shown {gain} times as strong as it is.",
    )


def _error_figure(result: DemoResult) -> Any:
    def below(parts: Mapping[float, float]) -> tuple[list[float], list[float]]:
        finite = {t: -value for t, value in parts.items() if math.isfinite(value)}
        return list(finite), list(finite.values())

    series = {"whole error": below(result.sqnr), "drift": below(result.drift)}
    return lines(series, "timestep t (sampling runs from right to left)", "error over output (dB)")
