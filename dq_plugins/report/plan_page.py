"""The page that explains a plan."""

from __future__ import annotations

from collections import Counter

from dq_plugins.passes.steps.figure import steps_figure
from dq_plugins.plan import QuantPlan
from dq_plugins.report.page import Page
from dq_plugins.report.plots import lines
from dq_plugins.report.table import Table


def add_groups(page: Page, plan: QuantPlan) -> None:
    """Timestep groups, and the error over their number if a pass measured it."""
    rows = [[name, len(g), ", ".join(f"{e:g}" for e in g.edges) or "-"] for name, g in plan.groups.items()]
    if rows:
        page.heading("Timestep groups")
        page.table(Table(["name", "groups", "edges"], rows))
    curve = plan.sections.get("timestep-groups")
    if curve is not None and "relative_error" in curve.data:
        figure = lines(
            {"error": (curve.data["groups"], curve.data["relative_error"])},
            "number of timestep groups G",
            "activation error / power, summed over layers",
        )
        page.figure(figure, "What one more group buys: the least activation error for every number of groups.")


def add_sampling(page: Page, plan: QuantPlan) -> None:
    """Timesteps that the plan chose, and error against cost if it was measured."""
    if plan.sampling is None:
        return
    page.heading("Sampling")
    page.text(f"{len(plan.sampling)} timesteps: {', '.join(f'{t:g}' for t in plan.sampling.timesteps)}.")
    section = plan.sections.get("timestep-reduction")
    if section is not None and section.data["points"]:
        page.figure(steps_figure(plan), "Error against cost; numbers are steps.")


def add_layers(page: Page, plan: QuantPlan) -> None:
    """Counts by width, and every layer."""
    counts = Counter((layer.width, layer.kept or "") for layer in plan.layers.values())
    page.heading("Layers")
    page.table(Table(["layers", "width", "why not quantized"], [[n, w, why] for (w, why), n in counts.most_common()]))
    rows = [
        [name, layer.kind, ", ".join(sorted(layer.roles)), layer.width, layer.kept or ""]
        for name, layer in plan.layers.items()
    ]
    page.table(Table(["layer", "kind", "roles", "width", "why not quantized"], rows), folded=f"all {len(rows)} layers")


def plan_page(plan: QuantPlan) -> Page:
    """A page with everything the plan decided."""
    page = Page(f"Plan for {plan.model}")
    page.text(
        f"Recipe {plan.recipe!r}, seed {plan.seed}, {len(plan.schedule)} timesteps from {plan.schedule.timesteps[0]:g} "
        f"to {plan.schedule.timesteps[-1]:g}. Plan hash {plan.hash[:16]}, weights hash {plan.model_hash[:16]}."
    )
    page.table(Table(["pass", "options"], [[p.name, str(dict(p.options))] for p in plan.passes]))
    add_sampling(page, plan)
    add_groups(page, plan)
    add_layers(page, plan)
    return page
