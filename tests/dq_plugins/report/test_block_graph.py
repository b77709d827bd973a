import networkx as nx

from dq_plugins.graph import partition
from dq_plugins.report.block_graph import block_figure, block_graph, block_of
from dq_plugins.testing.denoiser import TinyDenoiser, example_inputs


def test_blocks_end_at_the_first_number():
    assert block_of("down_blocks.1.resnets.0.conv1") == "down_blocks.1"
    assert block_of("time_embedding.linear_1") == "time_embedding"
    assert block_of("mid_block.attentions.0.proj") == "mid_block.attentions.0"


def test_every_layer_is_in_one_block_and_the_temporal_block_is_told_apart():
    found = partition(TinyDenoiser(), example_inputs())
    blocks = block_graph(found)
    assert nx.is_directed_acyclic_graph(blocks)
    counted = {signature: 0 for _, signature in blocks}
    for (_, signature), data in blocks.nodes(data=True):
        counted[signature] += data["layers"]
    assert counted["temporal"] == len(found.temporal)
    assert sum(counted.values()) == len(found.layers) - len(found.constant)
    sample = next(node for node, data in blocks.nodes(data=True) if data["label"] == found.sample_argument)
    ends = [node for node in blocks if not blocks.out_degree(node)]
    assert all(nx.has_path(blocks, sample, end) for end in ends)
    assert len(block_figure(found).axes[0].texts) >= len(blocks)
