"""A plan in a few lines: how many layers have which widths, and which stay in full precision, and why."""

from __future__ import annotations

from collections import Counter

from dq_plugins.plan import QuantPlan
from dq_plugins.report import Table


def plan_table(plan: QuantPlan) -> Table:
    """One row per combination of width and reason, most layers first."""
    counts = Counter((layer.width, layer.kept or "") for layer in plan.layers.values())
    rows = [[count, width, why] for (width, why), count in counts.most_common()]
    return Table(["layers", "width", "why not quantized"], rows)
