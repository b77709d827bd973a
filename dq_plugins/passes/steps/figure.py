"""Error against cost: the joint plan beside the sampler's own timesteps with the best bits and with uniform bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dq_plugins.plots import lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(
    points: Mapping[str, Sequence[Sequence[float]]], x_label: str, chosen: tuple[float, float] | None = None
) -> Figure:
    """Plot points, each with its number of steps; the chosen one is marked.

    Args:
        points: by rule, ``(cost, error, steps)`` of each point.
        x_label: what the cost is.
        chosen: cost and error of the plan that was taken.
    """
    ordered = {rule: sorted(each) for rule, each in points.items()}
    series = {rule: ([p[0] for p in each], [p[1] for p in each]) for rule, each in ordered.items()}
    y_label = "error to full precision over all recorded steps"
    figure = lines(series, x_label, y_label, log_x=True, log_y=True, chosen=chosen)
    (axis,) = figure.axes
    for cost, error, steps in (point for each in ordered.values() for point in each):
        axis.annotate(f"{int(steps)}", (cost, error), fontsize=6, xytext=(2, 3), textcoords="offset points")
    return figure
