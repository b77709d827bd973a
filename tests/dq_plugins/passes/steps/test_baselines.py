from __future__ import annotations

from dq_plugins.passes.steps.baselines import draw


def test_every_point_is_drawn_with_its_number_of_steps():
    (axis,) = draw({"joint": [[2.0, 0.1, 5], [1.0, 0.2, 4]]}, "BitOps", (2.0, 0.1)).axes
    assert list(axis.lines[0].get_xdata()) == [1.0, 2.0]
    assert [t.get_text() for t in axis.texts] == ["4", "5"]
    assert axis.lines[1].get_label() == "chosen"
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
