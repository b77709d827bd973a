from __future__ import annotations

import json
import math
from pathlib import Path

import networkx as nx
import pytest
import torch
from odd_denoisers import Obelisk, Quarry, TwoLayers
from torch import nn

from dq_plugins.errors import TraceError
from dq_plugins.graph import trace


def layer_node(graph: nx.DiGraph, layer: str) -> dict:
    return next(data for data in graph.nodes.values() if data["layer"] == layer)


def depends(model: nn.Module, layer: str, inputs: dict | None = None) -> set[str]:
    return set(layer_node(trace(model, inputs or TwoLayers.inputs()), layer)["depends"])


@pytest.fixture(scope="module")
def quarry() -> nx.DiGraph:
    return trace(Quarry(), Quarry.inputs())


def test_nodes_carry_what_reads_off_the_code(quarry):
    conv = layer_node(quarry, "c")
    assert conv["op"] == "aten.conv2d.default"
    assert (conv["kind"], conv["module"]) == ("conv2d", "c")
    assert (conv["shape"], conv["dtype"]) == ([2, 8, 4, 4], "float32")
    assert conv["operand_shapes"] == [[2, 8, 8, 8], [8, 8, 3, 3], [8]]
    assert conv["macs"] == 2 * 8 * 16 * 8 * 9
    assert conv["parameters"] == ["c.bias", "c.weight"]
    assert conv["depends"] == ["noise_level", "noisy"]
    assert conv["options"]["stride"] == [2, 2]


def test_the_graph_is_acyclic_in_execution_order_and_ends_in_the_output(quarry):
    order = {node: position for position, node in enumerate(quarry)}
    assert all(order[a] < order[b] for a, b in quarry.edges)
    assert list(quarry)[-1] == "output"
    assert quarry.nodes["output"]["depends"] == ["noise_level", "noisy", "words"]


def test_the_graph_survives_json_unchanged(quarry):
    back = nx.node_link_graph(json.loads(json.dumps(nx.node_link_data(quarry), allow_nan=False)))
    assert dict(back.nodes(data=True)) == dict(quarry.nodes(data=True))
    assert list(back.edges(data=True)) == list(quarry.edges(data=True))


def test_dependencies_follow_the_data(quarry):
    expected = {"alpha.0": {"noise_level"}, "a": {"noisy"}, "m.index": {"words"}, "b.q": {"noisy", "noise_level"}}
    assert {layer: set(layer_node(quarry, layer)["depends"]) for layer in expected} == expected


def test_edges_say_which_operand_they_are():
    graph = trace(Obelisk(), Obelisk.inputs())
    attention = next(n for n, d in graph.nodes(data=True) if d["kind"] == "attention")
    assert sorted(p for _, _, d in graph.in_edges(attention, data=True) for p in d["positions"]) == [0, 1, 2]


def test_macs_of_a_model_by_hand(quarry):
    convs = 64 * (3 * 8 + 2 * 8 * 8 + 24 * 8 + 8 * 8 + 8 * 3 + 16 * 16) * 9 + 16 * (8 * 8 + 8 * 16 + 16 * 16) * 9
    pointwise = 16 * (8 * 16 + 2 * 16 * 16) + 64 * 24 * 8
    linears = 8 * 16 + 16 * 16 + 16 * (16 + 32 + 16) + 2 * 5 * 6 * 16
    attention = 2 * 16 * 5 * 16
    assert sum(d["macs"] for d in quarry.nodes.values()) == 2 * (convs + pointwise + linears + attention)


def test_the_original_is_left_as_it_was():
    model = Quarry().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace(model, Quarry.inputs())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


class Heavy(TwoLayers):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8192), nn.Linear(8192, 8192), nn.Linear(8192, 4))  # 256 MiB


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resets the peak of resident memory, on Linux")
def test_no_memory_is_taken_for_the_weights():
    model = Heavy()
    trace(TwoLayers(), TwoLayers.inputs())  # what tracing loads the first time
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    trace(model, TwoLayers.inputs())
    assert resident("VmHWM") - before < 128 * 1024


def resident(field: str) -> int:
    """Resident memory in KiB, now (VmRSS) or at its peak (VmHWM)."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if field in line).split()[1])


def test_a_denoiser_on_the_meta_device_gives_the_same_graph(quarry):
    with torch.device("meta"):
        model = Quarry()
    inputs = {name: tensor.to("meta") for name, tensor in Quarry.inputs().items()}
    assert dict(trace(model, inputs).nodes(data=True)) == dict(quarry.nodes(data=True))


def test_a_compiled_denoiser_keeps_its_names(quarry):
    assert list(trace(torch.compile(Quarry()), Quarry.inputs())) == list(quarry)


def test_the_order_of_the_inputs_does_not_matter(quarry):
    inputs = dict(reversed(Quarry.inputs().items()))
    assert nx.node_link_data(trace(Quarry(), inputs)) == nx.node_link_data(quarry)


class Nested(TwoLayers):
    def forward(self, x, t, extra):
        return self.body(x) + self.time(t + extra["a"]["ids"][0])


def test_nested_arguments_have_dotted_names():
    inputs = {**TwoLayers.inputs(), "extra": {"a": {"ids": [torch.ones(2, 4)]}, "mode": "plain", "none": None}}
    assert depends(Nested(), "time", inputs) == {"t", "extra.a.ids.0"}


class NumberTime(TwoLayers):
    def forward(self, x, t):
        t = t if torch.is_tensor(t) else torch.tensor(float(t))
        return self.body(x) + self.time(t.reshape(1, 1).expand(1, 4).float())


def test_a_timestep_that_is_a_number_is_followed():
    assert depends(NumberTime(), "time", {"x": torch.zeros(2, 4), "t": 7}) == {"t"}


class WritesThroughAView(TwoLayers):
    def forward(self, x, t):
        e = torch.zeros_like(t)
        half = e[:, :2]
        half += x[:, :2]
        return self.body(x) + self.time(e)


class WritesToAnother(TwoLayers):
    def forward(self, x, t):
        e, other = t * 2, t * 3
        other[:, 0] = x[:, 0]
        return self.body(x) + self.time(e) + other


def test_a_write_through_a_view_reaches_the_whole_tensor():
    assert depends(WritesThroughAView(), "time") == {"x"}


def test_a_write_to_one_tensor_does_not_reach_another():
    assert depends(WritesToAnother(), "time") == {"t"}


class ShapesOnly(TwoLayers):
    def forward(self, x, t):
        e = t * torch.ones_like(x) + x.new_zeros(4) + t.expand_as(x).type_as(x)
        return self.body(x) + self.time(e)


def test_taking_a_shape_is_no_dependency():
    assert depends(ShapesOnly(), "time") == {"t"}


class Regions(TwoLayers):
    def forward(self, x, t):
        with torch.enable_grad():
            t = t * 2
        with torch.autocast("cpu", enabled=False):
            e = self.time(t.float())
        return self.body(x) + e


def test_control_regions_are_part_of_the_graph():
    graph = trace(Regions(), TwoLayers.inputs())
    assert layer_node(graph, "time")["depends"] == ["t"]
    assert layer_node(graph, "body")["depends"] == ["x"]


class WritesInARegion(TwoLayers):
    def forward(self, x, t):
        e = t * 2
        with torch.autocast("cpu", enabled=False):
            half = e[:, :2]
            half.add_(x[:, :2])
            h = self.body(e)
        return h + self.time(e)


def test_a_write_inside_of_a_region_reaches_inside_and_outside():
    graph = trace(WritesInARegion(), TwoLayers.inputs())
    assert layer_node(graph, "body")["depends"] == layer_node(graph, "time")["depends"] == ["t", "x"]


class Masked(TwoLayers):
    def forward(self, x, t):
        return (self.body(x) + self.time(t)).masked_fill(t > 0.5, -math.inf)


def test_infinite_constants_stay_json():
    graph = trace(Masked(), TwoLayers.inputs())
    assert any("-inf" in d["options"].values() for d in graph.nodes.values())
    json.dumps(nx.node_link_data(graph), allow_nan=False)


class Selects(TwoLayers):
    def forward(self, x, t):
        rows = torch.nonzero(t[:, 0])[:, 0]
        return x + self.body(x[rows]).sum() + self.time(t)


class Repeats(TwoLayers):
    def forward(self, x, t):
        count = int(t.sum().item())
        torch._check(count >= 0)
        return self.body(x) + torch.zeros(count, 4, device=x.device).sum(0)


def test_a_size_that_a_mask_decides_counts_at_its_largest():
    body = layer_node(trace(Selects(), TwoLayers.inputs()), "body")
    assert (body["shape"], body["macs"]) == ([2, 4], 2 * 4 * 4)
    assert body["depends"] == ["t", "x"]


def test_a_size_without_a_bound_is_refused_where_nothing_has_values_and_else_that_of_the_call():
    with pytest.raises(TraceError, match="depends on tensor values without a bound"):
        trace(Repeats().to("meta"), TwoLayers.inputs())
    graph = trace(Repeats(), TwoLayers.inputs())
    assert graph.graph["tracer"].startswith("a call that was really made")
    assert layer_node(graph, "body")["depends"] == ["x"]


class Tied(TwoLayers):
    def __init__(self):
        super().__init__()
        self.time.weight = self.body.weight


class Normed(TwoLayers):
    def __init__(self):
        super().__init__()
        self.time = nn.utils.parametrizations.weight_norm(self.time)
        self.body = nn.utils.weight_norm(self.body)


class UsesAnothersWeight(TwoLayers):
    def forward(self, x, t):
        return x @ self.body.weight.t() + nn.functional.linear(t, self.time.weight)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("model", [TwoLayers, Tied, Normed, UsesAnothersWeight])
def test_layers_are_the_modules_that_hold_the_weight(model):
    graph = trace(model(), TwoLayers.inputs())
    found = {d["layer"]: (d["kind"], d["depends"]) for d in graph.nodes.values() if d["layer"]}
    assert found == {"time": ("linear", ["t"]), "body": ("linear", ["x"])}


def test_wrong_inputs_are_refused_before_tracing():
    with pytest.raises(TraceError, match="no argument 'z'"):
        trace(TwoLayers(), {"z": torch.zeros(1)})
