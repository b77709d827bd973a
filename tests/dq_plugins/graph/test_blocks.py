from __future__ import annotations

from odd_denoisers import Obelisk, Quarry

from dq_plugins.graph import partition
from dq_plugins.graph.blocks import block_of


def test_blocks_are_where_residual_connections_close():
    layers = partition(Quarry(), Quarry.inputs()).layers
    assert {name: info.block for name, info in layers.items()} == {
        name: name[0] if name[0] in "bdfm" else "" for name in layers
    }


def test_adding_two_halves_of_one_output_closes_no_residual_connection():
    layers = partition(Obelisk(), Obelisk.inputs()).layers
    assert layers["slabs.0.qkv"].block == layers["slabs.0.mod"].block == "slabs.0"
    assert layers["when"].block == layers["leave"].block == ""


def test_the_innermost_closing_module_counts():
    assert block_of("a.b.c", {"a", "a.b"}) == "a.b"
    assert block_of("a.bc", {"a.b"}) == ""
    assert block_of("", {"a"}) == ""
