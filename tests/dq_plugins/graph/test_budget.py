from __future__ import annotations

import pytest
from odd_denoisers import Obelisk

from dq_plugins.errors import BudgetError
from dq_plugins.graph import LayerInfo, partition
from dq_plugins.graph.budget import Bits, bitops, mean_weight_bits, total_bitops, total_weight_bytes, weight_bytes


def layer(name: str, weight: tuple[int, ...], macs: int) -> LayerInfo:
    return LayerInfo(name, "linear", "Linear", 0, weight, macs, (), (), frozenset(), "sample", frozenset(), "")


LAYERS = {"a": layer("a", (3, 5), 100), "b": layer("b", (4, 4), 1000)}


def test_costs_of_one_layer_by_hand():
    assert bitops(LAYERS["a"], 4, 8) == 100 * 32
    assert weight_bytes(LAYERS["a"], 8) == 15
    assert weight_bytes(LAYERS["a"], 3) == 6  # 45 bits


def test_totals_add_up_and_unnamed_layers_stay_in_floating_point():
    assert total_bitops(LAYERS, {"a": Bits(4, 8)}) == 100 * 32 + 1000 * 1024
    assert total_weight_bytes(LAYERS, {"a": 4, "b": 8}) == 8 + 16
    assert total_weight_bytes(LAYERS, {"a": 4}) == 8 + 64
    assert mean_weight_bits(LAYERS, {"a": 4, "b": 8}) == pytest.approx((15 * 4 + 16 * 8) / 31)


def test_eight_bits_everywhere_take_a_quarter_of_the_weights_of_a_model():
    layers = partition(Obelisk(), Obelisk.inputs()).layers
    assert total_weight_bytes(layers, dict.fromkeys(layers, 8)) * 4 == total_weight_bytes(layers, {})


@pytest.mark.parametrize("bits", [0, 33])
def test_impossible_widths_are_refused(bits):
    with pytest.raises(BudgetError, match=f"'a' was given {bits} bits"):
        total_weight_bytes(LAYERS, {"a": bits})


def test_unknown_layers_are_refused_with_close_names():
    layers = {"block.attn": LAYERS["a"], "other": LAYERS["b"]}
    with pytest.raises(BudgetError, match=r"'block\.atn'.*block\.attn"):
        mean_weight_bits(layers, {"block.atn": 4})


def test_no_layers_have_no_mean():
    with pytest.raises(BudgetError, match="no layer"):
        mean_weight_bits({}, {})
