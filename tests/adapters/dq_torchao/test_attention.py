from __future__ import annotations

import copy
import pickle

import dq_torchao
import pytest
import torch
from attention_models import ALONE, SCHEDULE, attention_denoiser, attention_inputs, attention_plan
from dq_torchao import Timing
from dq_torchao.attention import IntegerAttention

import dq_plugins as dq
from dq_plugins.errors import DQError
from dq_plugins.report.execution import executions


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> dq.QuantPlan:
    return attention_plan(attention_denoiser(), tmp_path_factory.mktemp("calib"), ALONE)


@pytest.fixture
def model(plan):
    return dq_torchao.apply(attention_denoiser(), plan)


@pytest.fixture
def reference(plan):
    return dq.apply(attention_denoiser(), plan, backend="simulate")


MASK = torch.tensor([[True] * 5 + [False] * 2, [True] * 7, [True] * 3 + [False] * 4])


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("t", [*SCHEDULE, torch.tensor(SCHEDULE)], ids=["900", "500", "100", "mixed"])
def test_equals_the_simulated(model, reference, t, mask) -> None:
    inputs = attention_inputs(t) | {"mask": mask}
    y, expected = model(**inputs), reference(**inputs)
    assert float((y - expected).norm() / expected.norm()) < 1e-3
    assert float((y - attention_denoiser()(**inputs)).norm()) > 0


def test_the_report_says_what_runs(model, plan) -> None:
    assert isinstance(model.near.quantized_attention, IntegerAttention)
    for report in (dq_torchao.execution_report(model), executions(model, plan)):
        for name in ("near", "far"):
            assert (report[name].state, report[name].width, report[name].kernel) == (
                "integer",
                "A8",
                "dq_torchao.attention",
            )


def test_where_it_does_not_pay_it_stays(plan) -> None:
    model = dq_torchao.apply(attention_denoiser(), plan, choices={"near": Timing(2.0, 1.0), "far": Timing(1.0, 2.0)})
    report = dq_torchao.execution_report(model)
    assert report["near"].state == "full precision"
    assert report["near"].reason == "floating point is faster here: 1.000 ms against 2.000 ms"
    assert report["far"].state == "integer"
    assert not hasattr(model.near, "quantized_attention")


def test_it_is_measured_with_the_layers(plan) -> None:
    denoiser, inputs = attention_denoiser(), attention_inputs()
    before = denoiser(**inputs)
    timings = dq_torchao.tune(denoiser, plan, inputs)
    assert list(timings) == ["near", "far"]
    assert all(t.integer > 0 and t.floating > 0 for t in timings.values())
    assert torch.equal(denoiser(**inputs), before)


def test_without_a_kernel_pytorch_attends_and_the_report_says_why(plan, monkeypatch) -> None:
    kernel = dq_torchao.kernels.operators.Kernel("", "", "no compiler here")
    monkeypatch.setattr("dq_torchao.attention.attention_kernel", lambda device: kernel)
    model, inputs = dq_torchao.apply(attention_denoiser(), plan), attention_inputs()
    assert dq_torchao.execution_report(model)["near"].reason == "no compiler here"
    assert torch.equal(model(**inputs), attention_denoiser()(**inputs))


@pytest.mark.parametrize("freezing", [False, True])
def test_compiles_to_one_graph_that_follows_the_timestep(model, freezing: bool) -> None:
    with torch._inductor.config.patch(freezing=freezing), torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True)
        for t in SCHEDULE:
            inputs = attention_inputs(t)
            error = (compiled(**inputs) - model(**inputs)).norm() / model(**inputs).norm()
            assert float(error) < 1e-3


def test_regions_compile(model) -> None:
    torch._dynamo.reset()
    inputs = attention_inputs()
    expected = model(**inputs)
    model.near.compile(fullgraph=True)
    with torch.no_grad():
        assert float((model(**inputs) - expected).norm() / expected.norm()) < 1e-3
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):  # noqa: SIM117
        with pytest.raises(torch._dynamo.exc.Unsupported, match="Compile the denoiser as a whole"):
            model(**inputs)


def test_saved_and_loaded(model, tmp_path) -> None:
    inputs = attention_inputs()
    loaded = dq_torchao.load(attention_denoiser(seed=1), dq_torchao.save(model, tmp_path))
    assert torch.equal(loaded(**inputs), model(**inputs))
    assert dq_torchao.execution_report(loaded) == dq_torchao.execution_report(model)


def test_a_checkpoint_without_the_kernel_is_simulated(model, reference, tmp_path, monkeypatch) -> None:
    dq_torchao.save(model, tmp_path)
    kernel = dq_torchao.kernels.operators.Kernel("", "", "no compiler here")
    monkeypatch.setattr("dq_torchao.attention.attention_kernel", lambda device: kernel)
    loaded, inputs = dq_torchao.load(attention_denoiser(seed=1), tmp_path), attention_inputs()
    assert torch.equal(loaded(**inputs), reference(**inputs))
    report = dq_torchao.execution_report(loaded)["near"]
    assert (report.state, report.reason) == ("simulated", "no compiler here")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_attends_as_the_original(model, copied) -> None:
    inputs = attention_inputs()
    assert torch.equal(copied(model)(**inputs), model(**inputs))


def test_half_precision_keeps_the_ranges(model) -> None:
    scale = model.near.quantized_attention.query.scale.clone()
    model.bfloat16()
    inputs = {n: x if n == "timestep" else x.bfloat16() for n, x in attention_inputs().items()}
    assert torch.equal(model.near.quantized_attention.query.scale, scale)
    assert model(**inputs).dtype == torch.bfloat16


def test_no_gradient_passes(model) -> None:
    inputs = attention_inputs()
    inputs["sample"].requires_grad_()
    with pytest.raises(DQError, match="no gradient"):
        model(**inputs)
