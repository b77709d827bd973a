"""Plots for reports and benchmarks. Each function draws one figure from plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def _figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.0, 3.2)) -> tuple[Figure, list]:
    # the object-oriented interface: no global pyplot state, so figures are freed and threads do not meet
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    return figure, list(axes.flat)


def lines(
    series: Series,
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    chosen: tuple[float, float] | None = None,
) -> Figure:
    """Curves ``name -> (x, y)`` in one axis; ``chosen`` is a point that is marked by a star."""
    figure, (axis,) = _figure()
    for name, (x, y) in series.items():
        axis.plot(x, y, marker="o", markersize=3.5, linewidth=1.4, label=name)
    if chosen is not None:
        axis.plot(*[[value] for value in chosen], "k*", markersize=13, label="chosen", zorder=5)
    axis.set(xlabel=x_label, ylabel=y_label, xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    if len(axis.lines) > 1:
        axis.legend(frameon=False, fontsize=8)
    return figure


def activation_ranges(
    ranges: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    edges: Mapping[str, Sequence[float]],
) -> Figure:
    """Activation range of some layers over the timestep, with the edges of their timestep groups drawn on it.

    Args:
        ranges: layer name -> (timesteps, minima, maxima).
        edges: layer name -> edges of its timestep groups.
    """
    figure, axes = _figure(len(ranges), 1, size=(7.0, 1.7 * len(ranges) + 0.4))
    for axis, (name, (timesteps, low, high)) in zip(axes, ranges.items(), strict=True):
        axis.fill_between(timesteps, low, high, alpha=0.35, linewidth=0)
        axis.plot(timesteps, low, linewidth=1, color="C0")
        axis.plot(timesteps, high, linewidth=1, color="C0")
        for edge in edges[name]:
            axis.axvline(edge, color="C3", linewidth=0.9, linestyle="--")
        axis.set_title(name, fontsize=8, loc="left")
    axes[-1].set_xlabel("timestep t (dashed: group edges)")
    return figure


def pairs_of_images(rows: Mapping[str, Sequence], titles: Sequence[str]) -> Figure:
    """Images side by side.

    Args:
        rows: row label -> images, each ``[H, W]`` or ``[H, W, 3]`` in [0, 1].
        titles: one short title per column.
    """
    columns = len(titles)
    figure, axes = _figure(len(rows), columns, size=(1.15 * columns + 0.6, 1.25 * len(rows) + 0.2))
    for i, (label, images) in enumerate(rows.items()):
        for j, image in enumerate(images):
            axis = axes[i * columns + j]
            axis.imshow(image, interpolation="nearest", cmap="gray", vmin=0, vmax=1)
            axis.grid(visible=False)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if i == 0:
                axis.set_title(titles[j], fontsize=7)
            if j == 0:
                axis.set_ylabel(label, fontsize=8)
    return figure
