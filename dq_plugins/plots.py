"""Plots for reports and benchmarks. Each function draws one figure from plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx as nx
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
    if not log_x and all(float(value).is_integer() for x, _ in series.values() for value in x):
        axis.xaxis.get_major_locator().set_params(integer=True)  # there are no 2.5 groups
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
        edges: layer name -> edges of its timestep groups, if it has any.
    """
    figure, axes = _figure(len(ranges), 1, size=(7.0, 1.7 * len(ranges) + 0.4))
    for axis, (name, (timesteps, low, high)) in zip(axes, ranges.items(), strict=True):
        axis.fill_between(timesteps, low, high, alpha=0.35, linewidth=0)
        axis.plot(timesteps, low, linewidth=1, color="C0")
        axis.plot(timesteps, high, linewidth=1, color="C0")
        for edge in edges.get(name, ()):
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


def graph_of_blocks(blocks: nx.DiGraph, meanings: Mapping[str, str]) -> Figure:
    """Blocks from top to bottom as values flow, a colour for each signature.

    Args:
        blocks: without loops; each node with ``label``, ``signature`` and ``layers``, the number of layers in it.
        meanings: signature -> what the legend says, the first ones to the left of the main path and the last one on it.
    """
    from matplotlib.patches import Patch

    colours = {signature: f"C{i}" for i, signature in enumerate(meanings)}
    place = _places(blocks, list(meanings))
    x, y = ({position[i] for position in place.values()} for i in (0, 1))
    width, height = 1.3 * (max(x) - min(x) + 1), 0.55 * (max(y) - min(y) + 1)
    figure, (axis,) = _figure(size=(max(6.0, width), height + 0.5))
    axis.set_axis_off()
    for a, b in blocks.edges:
        bend = 0.0 if place[b][1] == place[a][1] - 1 or place[a][0] != place[b][0] else 0.35
        axis.annotate(
            "", place[b], place[a],
            arrowprops={"arrowstyle": "->", "color": colours[blocks.nodes[a]["signature"]], "lw": 0.9, "alpha": 0.7,
                        "shrinkA": 11, "shrinkB": 13, "connectionstyle": f"arc3,rad={bend}"},
        )  # fmt: skip
    for node, data in blocks.nodes(data=True):
        count = f"\n{data['layers']} layer{'s' * (data['layers'] != 1)}" if data["layers"] else ""
        axis.text(
            *place[node], f"{data['label']}{count}", ha="center", va="center", fontsize=6.5, color="white",
            bbox={"boxstyle": "round,pad=0.35", "fc": colours[data["signature"]], "ec": "none"},
        )  # fmt: skip
    found = {data["signature"] for _, data in blocks.nodes(data=True)}
    handles = [Patch(color=colours[each], label=text) for each, text in meanings.items() if each in found]
    axis.legend(handles=handles, frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2)
    axis.set(xlim=(min(x) - 0.6, max(x) + 0.6), ylim=(min(y) - 0.6, max(y) + 0.6))
    return figure


def _places(blocks: nx.DiGraph, order: Sequence[str]) -> dict[tuple, tuple[float, float]]:
    """Column and row of every node.

    Those of the last signature are the main path, in column 0. What feeds one block stands beside it, what feeds
    several in the row in which it is computed: the first two signatures to the right, the others to the left.
    """
    import networkx as nx

    place: dict[tuple, tuple[float, float]] = {}
    generations = {node: row for row, nodes in enumerate(nx.topological_generations(blocks)) for node in nodes}
    signatures = nx.get_node_attributes(blocks, "signature")
    main = [node for node in generations if signatures[node] == order[-1]]
    place |= {node: (column, -generations[node]) for column, node in _spread(main, generations)}
    for node in reversed(list(nx.topological_sort(blocks))):
        if node in place:
            continue
        side = 1 if signatures[node] in order[:2] else -1
        after = [place[each] for each in blocks.successors(node) if each in place]
        rows = {y for _, y in after}
        row = rows.pop() if len(rows) == 1 else -generations[node]
        column = 1 + max((abs(x) for x, _ in after), default=0)
        while (side * column, row) in place.values():
            column += 1
        place[node] = (side * column, row)
    return place


def _spread(nodes: Sequence[tuple], generations: Mapping[tuple, int]) -> list[tuple[int, tuple]]:
    """Nodes with a column each, 0 for the first of every row."""
    used: dict[int, int] = {}
    found = []
    for node in nodes:
        row = generations[node]
        found.append((used.get(row, 0), node))
        used[row] = used.get(row, 0) + 1
    return found
