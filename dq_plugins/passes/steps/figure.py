"""Error against cost: the joint plan beside the sampler's own timesteps with the best bits and with uniform bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dq_plugins.errors import PlanError
from dq_plugins.plan import QuantPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def steps_figure(plan: QuantPlan) -> Figure:
    """Error against cost as a plan made with ``{"timestep-reduction": {"sweep": (0.6, 1, 1.5)}}`` holds it.

    Raises:
        PlanError: the plan holds no such points.
    """
    section = plan.sections.get("timestep-reduction")
    if section is None or not section.data["points"]:
        raise PlanError(
            "this plan holds no error against cost; make it with the pass 'timestep-reduction' and its option sweep, "
            "for example sweep=(0.6, 1, 1.5)"
        )
    data = section.data
    return draw(data["points"], f"cost of a sampling run, {data['unit']}", (data["cost"], data["loss"]))


def draw(
    points: Mapping[str, Sequence[Sequence[float]]], x_label: str, chosen: tuple[float, float] | None = None
) -> Figure:
    """Plot points, each with its number of steps; the chosen one is marked.

    Args:
        points: by rule, ``(cost, error, steps)`` of each point.
        x_label: what the cost is.
        chosen: cost and error of the plan that was taken.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    for rule, each in points.items():
        ordered = sorted(each)
        axis.plot([p[0] for p in ordered], [p[1] for p in ordered], "o-", markersize=3.5, linewidth=1.4, label=rule)
        for cost, error, steps in ordered:
            axis.annotate(f"{int(steps)}", (cost, error), fontsize=6, xytext=(2, 3), textcoords="offset points")
    if chosen is not None:
        axis.plot(*[[v] for v in chosen], "k*", markersize=13, label="chosen", zorder=5)
    axis.set(xlabel=x_label, ylabel="error to full precision over all recorded steps", xscale="log", yscale="log")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return figure
