from __future__ import annotations

import dq_torchao
import pytest
import torch
from dq_torchao import Timing
from dq_torchao.tuning import InputLayout
from torchao_models import Denoiser, denoiser_plan

from dq_plugins.errors import PlanError


def inputs() -> dict[str, torch.Tensor]:
    return {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(500.0)}


def test_times_every_layer_that_can_run_in_integers_and_leaves_the_model_alone():
    model = Denoiser()
    plan = denoiser_plan(model)
    before = model(**inputs() | {"sample": torch.ones(1, 4, 8, 8)})
    timings = dq_torchao.tune(model, plan, inputs())
    assert list(timings) == ["conv_in", "up", "down", "conv_out"]  # layer ``time`` is not quantized
    assert all(t.integer > 0 and t.floating > 0 for t in timings.values())
    assert torch.equal(model(**inputs() | {"sample": torch.ones(1, 4, 8, 8)}), before)


def test_layers_go_integer_only_where_it_pays():
    model = Denoiser()
    weight = model.down.weight
    choices = {"up": Timing(integer=1.0, floating=2.0), "down": Timing(integer=2.0, floating=1.0)}
    dq_torchao.apply(model, denoiser_plan(model), choices=choices)
    report = dq_torchao.execution_report(model)
    assert report["up"].state == "integer"
    assert report["down"].state == "full precision"
    assert report["down"].reason == "floating point is faster here: 1.000 ms against 2.000 ms"
    assert model.down.weight is weight
    assert report["conv_in"].state == "integer"  # not measured: integer as the plan says


def test_layers_alike_are_timed_once(monkeypatch):
    timed = []

    def fake(layer, *_):
        timed.append(layer)
        return Timing(1.0, 2.0)

    monkeypatch.setattr("dq_torchao.tuning.time_layer", fake)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)), torch.nn.Linear(4, 2))
    model.forward = lambda sample, timestep: torch.nn.Sequential.forward(model, sample)
    timings = dq_torchao.tune(model, denoiser_plan(model), {"sample": torch.ones(2, 4), "timestep": torch.tensor(1.0)})
    assert list(timings) == ["0", "1", "2", "3"]
    assert len(timed) == 2


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 3, 4, 5),
        torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.ones(2, 6).chunk(2, 1)[1],
        torch.ones(3, 1).expand(3, 8),
    ],
    ids=["contiguous", "channels last", "slice", "expanded"],
)
def test_random_inputs_have_the_layout_that_was_seen(x):
    y = InputLayout(tuple(x.shape), x.stride(), x.dtype).random(x.device)
    assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), x.dtype)
    assert y.std() > 0


def test_wrong_example_inputs_are_named():
    with pytest.raises(PlanError, match="do not fit Denoiser"):
        dq_torchao.tune(Denoiser(), denoiser_plan(Denoiser()), {"image": torch.ones(1)})


def test_fastest_is_measured_and_smallest_is_not(monkeypatch):
    def timings(model, plan, example_inputs):
        return {"up": Timing(1.0, 2.0), "down": Timing(2.0, 1.0)}

    monkeypatch.setattr("dq_torchao.adapter.tune", timings)
    smallest, fastest = Denoiser(), Denoiser()
    dq_torchao.apply(smallest, denoiser_plan(smallest))
    dq_torchao.apply(fastest, denoiser_plan(fastest), prefer="fastest", example_inputs=inputs())
    states = [dq_torchao.execution_report(each)["down"].state for each in (smallest, fastest)]
    assert states == ["integer", "full precision"]


def test_it_says_when_nothing_is_gained(monkeypatch):
    monkeypatch.setattr("dq_torchao.adapter.tune", lambda *_: {"up": Timing(2.0, 1.0), "down": Timing(2.0, 1.0)})
    model = Denoiser()
    with pytest.warns(UserWarning, match="gains nothing: none of the 2 layers"):
        dq_torchao.apply(model, denoiser_plan(model), prefer="fastest", example_inputs=inputs())


@pytest.mark.parametrize("options", [{"prefer": "fastest"}, {"example_inputs": {}}, {"prefer": "small"}])
def test_half_an_order_is_refused(options):
    model = Denoiser()
    with pytest.raises(PlanError, match="prefer"):
        dq_torchao.apply(model, denoiser_plan(model), **options)
