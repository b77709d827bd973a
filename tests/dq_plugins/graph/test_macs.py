from __future__ import annotations

import pytest

from dq_plugins.graph.macs import count_macs

# Each count is written as the loops it stands for: output elements times products summed per element.
CASES = [
    ("linear", [(2, 7, 5), (3, 5)], (2, 7, 3), 2 * 7 * 3 * 5),
    ("linear", [(5,), (3, 5), (3,)], (3,), 3 * 5),
    ("matmul", [(2, 4, 5), (5, 3)], (2, 4, 3), 2 * 4 * 3 * 5),
    ("bmm", [(2, 4, 5), (2, 5, 3)], (2, 4, 3), 2 * 4 * 3 * 5),
    ("addmm", [(3,), (4, 5), (5, 3)], (4, 3), 4 * 3 * 5),
    ("baddbmm", [(2, 4, 3), (2, 4, 5), (2, 5, 3)], (2, 4, 3), 2 * 4 * 3 * 5),
    ("conv2d", [(2, 4, 8, 8), (6, 4, 3, 3)], (2, 6, 4, 4), 2 * 6 * 4 * 4 * 4 * 9),
    ("conv2d", [(1, 8, 5, 5), (8, 1, 3, 3)], (1, 8, 5, 5), 8 * 25 * 9),  # depthwise
    ("conv1d", [(1, 4, 9), (2, 4, 3)], (1, 2, 9), 2 * 9 * 4 * 3),
    ("conv3d", [(1, 4, 2, 6, 6), (5, 4, 1, 2, 2)], (1, 5, 2, 3, 3), 5 * 2 * 9 * 4 * 4),
    ("conv_transpose2d", [(1, 4, 3, 3), (4, 5, 2, 2)], (1, 5, 6, 6), 4 * 9 * 5 * 4),
    ("scaled_dot_product_attention", [(2, 3, 7, 4), (2, 3, 5, 4), (2, 3, 5, 6)], (2, 3, 7, 6), 6 * 7 * 5 * (4 + 6)),
    ("silu", [(2, 3)], (2, 3), 0),
    ("embedding", [(10, 4), (3,)], (3, 4), 0),
]


@pytest.mark.parametrize(("op", "operands", "output", "expected"), CASES)
def test_counts_by_hand(op, operands, output, expected):
    assert count_macs(op, operands, output) == expected


def test_einsum_multiplies_every_index():
    assert count_macs("einsum", [(2, 3, 7), (2, 5, 3)], (2, 7, 5), "bcn, blc -> bnl") == 2 * 3 * 7 * 5
    assert count_macs("einsum", [(2, 4, 6, 7), (7, 3)], (2, 4, 6, 3), "...k,kd->...d") == 2 * 4 * 6 * 7 * 3
