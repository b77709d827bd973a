from __future__ import annotations

import numpy as np
import pytest

from dq_plugins.passes.steps.baselines import draw, widest
from dq_plugins.passes.steps.intervals import StepIntervals
from dq_plugins.passes.steps.space import LayerChoices, Space
from dq_plugins.quantized.candidates import Entry


def test_every_point_is_drawn_with_its_number_of_steps():
    (axis,) = draw({"joint": [[2.0, 0.1, 5], [1.0, 0.2, 4]]}, "BitOps", (2.0, 0.1)).axes
    assert list(axis.lines[0].get_xdata()) == [1.0, 2.0]
    assert [t.get_text() for t in axis.texts] == ["4", "5"]
    assert axis.lines[1].get_label() == "chosen"
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")


@pytest.mark.parametrize(("quiet", "expected"), [("weight", (0, 1)), ("activation", (1, 0))])
def test_of_uniform_widths_with_one_cost_the_least_noise_is_taken(quiet, expected):
    """W4A6 and W6A4 cost the same in BitOps."""
    cost = np.outer([4.0, 6.0], [4.0, 6.0])
    space = Space({1: StepIntervals((10.0,), (0,))}, (LayerChoices("layer", (4, 6), (4, 6), cost),), budget=24.0)
    noise = {Entry("layer", operand, bits): 1.0 / bits for operand in ("weight", "activation") for bits in (4, 6)}
    noise |= {Entry("layer", quiet, bits): 0.0 for bits in (4, 6)}
    assert widest(space, 1, noise) == expected
