from __future__ import annotations

import networkx as nx
import odd_denoisers
import pytest
import torch
from odd_denoisers import TwoLayers
from torch import Tensor, nn

import dq_plugins as dq
from dq_plugins.errors import TraceError
from dq_plugins.graph import partition, trace
from dq_plugins.graph.lowering import lower
from dq_plugins.graph.real_call import trace_real_call


class Deciding(nn.Module):
    """Branches on the timestep, reads lengths out of a tensor, writes into a view in place."""

    def __init__(self, threshold: float = 500.0) -> None:
        super().__init__()
        self.threshold = threshold
        self.time, self.words = nn.Linear(1, 8), nn.Linear(3, 8)
        self.inner, self.outer, self.unused = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
        t = self.time(timestep.reshape(-1, 1) / 1000)
        if bool((timestep > self.threshold).all()):
            sample = sample * 2
        h = self.inner(sample) + t[:, None]
        context = torch.zeros(len(sample), max(lengths.tolist()), 8)
        for row, length in enumerate(lengths.tolist()):
            context[row, :length] = self.words(text[row, :length])
        return self.outer(torch.cat([h, context], 1))[:, : sample.shape[1]]


def inputs(t: float = 900.0) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 6, 4, generator=make),
        "timestep": torch.full((2,), t),
        "text": torch.randn(2, 5, 3, generator=make),
        "lengths": torch.tensor([3, 5]),
    }


def test_a_denoiser_that_asks_for_values_is_partitioned_by_a_call():
    part = partition(Deciding(), inputs(), timestep="timestep")
    assert part.temporal == {"time"}
    assert part.condition == {"words"}
    assert part.sample == {"inner", "outer"}
    assert part.layers["outer"].depends == {"sample", "timestep", "text"}  # written in place, into a view
    assert part.layers["inner"].input_shape == (2, 6, 4)
    assert part.layers["words"].macs == (3 + 5) * 3 * 8


@pytest.mark.parametrize(
    ("threshold", "tracer"),
    [(500.0, "a call that was really made; with other values the denoiser runs other ops"), (9e9, "a call that was")],
)
def test_the_plan_says_how_the_graph_was_found(threshold, tracer, tmp_path):
    model = Deciding(threshold).eval().requires_grad_(False)

    def sample(net):
        for t in (900.0, 800.0, 700.0):
            net(**inputs(t))

    calibration = dq.record(model, sample, tmp_path / "c", progress=False)
    plan = dq.make_plan(model, calibration, "fast", progress=False)
    assert plan.tracer.startswith(tracer)
    assert f"traced:   by {tracer}" in repr(plan)
    assert plan.layers["time"].weight is not None
    assert plan.layers["unused"].weight is None
    for backend in ("simulate", "torchao"):
        assert dq.apply(model, plan, backend=backend)(**inputs()).isfinite().all()
    plan.save(tmp_path / "plan")
    assert dq.QuantPlan.load(tmp_path / "plan").tracer == plan.tracer


def dependencies(graph: nx.DiGraph) -> dict[str, tuple[str, list[str]]]:
    """Of every layer: its kind and what reaches it."""
    return {d["layer"]: (d["kind"], d["depends"]) for _, d in graph.nodes(data=True) if d["layer"]}


@pytest.mark.parametrize("name", [n for n, m in vars(odd_denoisers).items() if hasattr(m, "inputs")])
def test_a_call_finds_what_export_finds(name):
    torch.manual_seed(0)
    model, call = getattr(odd_denoisers, name)().eval(), getattr(odd_denoisers, name).inputs()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    called, exported = lower(trace_real_call(model, call), model), trace(model, call)
    assert exported.graph["tracer"] == "torch.export"
    assert dependencies(called) == dependencies(exported)
    modules = ({d["module"] for _, d in g.nodes(data=True) if d["layer"]} for g in (called, exported))
    assert next(modules) == next(modules)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_what_cannot_be_called_either_keeps_the_reason_of_export():
    class Wrong(TwoLayers):
        def forward(self, x, t):
            if t.mean() > 0:
                raise ValueError("no such timestep")
            return self.body(x)

    with pytest.raises(TraceError, match=r"cannot be traced by torch\.export") as error:
        trace(Wrong(), {name: value.abs() + 1 for name, value in TwoLayers.inputs().items()})
    assert "no such timestep" in repr(error.value.__cause__)
    with pytest.raises(TraceError, match=r"cannot be traced"):
        trace(Deciding().to("meta"), inputs())
