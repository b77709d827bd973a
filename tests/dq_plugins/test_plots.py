from __future__ import annotations

from dq_plugins.plots import activation_ranges, lines


def test_each_layer_shows_the_edges_of_its_own_groups():
    wave = ([1, 2, 3], [-1, -2, -3], [1, 2, 3])
    one, other = activation_ranges({"a": wave, "b": wave}, {"a": [1.5], "b": [0.5, 2.5]}).axes
    dashed = [[line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == "--"] for axis in (one, other)]
    assert dashed == [[1.5], [0.5, 2.5]]
    assert (one.get_title(loc="left"), other.get_title(loc="left")) == ("a", "b")


def test_legend_names_the_curves_and_the_chosen_point_but_not_a_curve_alone():
    (axis,) = lines({"ours": ([1, 2], [3, 4])}, "x", "y", chosen=(1, 3)).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["ours", "chosen"]
    (axis,) = lines({"ours": ([1, 2], [3, 4])}, "x", "y", log_y=True).axes
    assert axis.get_legend() is None
    assert (axis.get_xscale(), axis.get_yscale()) == ("linear", "log")


def test_what_is_counted_has_whole_ticks() -> None:
    ticks = lines({"error": ([1, 2, 3, 4], [4.0, 2.0, 1.0, 0.5])}, "groups", "error").axes[0].get_xticks()
    assert all(float(tick).is_integer() for tick in ticks)
    ticks = lines({"error": ([0.25, 0.5, 1.0], [4.0, 2.0, 1.0])}, "bits", "error").axes[0].get_xticks()
    assert not all(float(tick).is_integer() for tick in ticks)
