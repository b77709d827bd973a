from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from brevitas import nn as qnn
from brevitas import quant as stock
from brevitas.graph.calibrate import calibration_mode
from dq_brevitas import BrevitasAdapter, attach_timesteps, export_onnx_qcdq, onnxruntime_options, quantizers
from torch import nn

from dq_plugins.errors import DQError
from dq_plugins.testing.denoiser import TIMESTEPS, TinyDenoiser
from dq_plugins.testing.plans import handmade_plan
from dq_plugins.timesteps import TimestepGroups

onnxruntime = pytest.importorskip("onnxruntime")
PER_TIMESTEP = TimestepGroups.one_per_timestep(TIMESTEPS)


class Small(nn.Module):
    """A convolution and a product of matrices, both with an input that grows with t."""

    def __init__(self, act):
        super().__init__()
        options = {"bias": True, "weight_quant": stock.Int8WeightPerChannelFloat, "input_quant": act}
        self.first = qnn.QuantConv2d(4, 8, 3, **options)
        self.tokens = qnn.QuantLinear(8, 4, **options)

    def forward(self, sample, timestep):
        hidden = self.first(sample) * (timestep / 100).reshape(-1, 1, 1, 1)
        return self.tokens(hidden.flatten(2).transpose(1, 2))


@pytest.fixture
def small(calls) -> Callable[..., tuple[Small, list[dict[str, torch.Tensor]]]]:
    def build(act, groups=None):
        inputs = [{key: call[key] for key in ("sample", "timestep")} for call in calls]
        model = Small(act) if groups is None else attach_timesteps(Small(act), groups)
        with torch.no_grad(), calibration_mode(model):
            for call in inputs:
                model(**call)
        return model.eval(), inputs

    return build


def agree(exported, model, call):
    session = onnxruntime.InferenceSession(
        exported.SerializeToString(), onnxruntime_options(), providers=["CPUExecutionProvider"]
    )
    found = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in call.items()})[0])
    expected = model(**call)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_onnxruntime_agrees_at_every_group(calls, tmp_path):
    plan = handmade_plan(TinyDenoiser(), bits=6)
    model = BrevitasAdapter().apply(TinyDenoiser(), plan)
    exported = export_onnx_qcdq(model, kwargs=calls[0], path=tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").is_file()
    assert [i.name for i in exported.graph.input] == ["sample", "timestep", "condition"]
    kinds = [node.op_type for node in exported.graph.node]
    assert kinds.count("GreaterOrEqual") == 1, "the group is found once in the graph"
    assert kinds.count("QuantizeLinear") >= 8
    assert kinds.count("Gather") >= 8, "every quantizer looks its scale up"
    for call in calls:
        agree(exported, model, call)
    assert {PER_TIMESTEP.of(float(call["timestep"])) for call in calls} == set(range(5))


def test_zero_points_are_looked_up_too(small):
    model, inputs = small(quantizers.ShiftedUint8ActPerTimestepFloat.let(bit_width=5), PER_TIMESTEP)
    exported = export_onnx_qcdq(model, kwargs=inputs[0])
    assert [node.op_type for node in exported.graph.node].count("Gather") >= 4
    for call in inputs:
        agree(exported, model, call)


def test_one_timestep_per_sample(small):
    model, inputs = small(quantizers.Int8ActPerTimestepFloat, PER_TIMESTEP)
    batches = [{k: torch.cat([c[k][:1] for c in order]) for k in inputs[0]} for order in (inputs, inputs[::-1])]
    exported = export_onnx_qcdq(model, kwargs=batches[0])
    for batch in batches:
        agree(exported, model, batch)


def test_a_model_without_timestep_groups_exports_as_before(small):
    model, inputs = small(stock.Int8ActPerTensorFloat)
    agree(export_onnx_qcdq(model, kwargs=inputs[0]), model, inputs[1])


def test_widths_that_onnx_lacks_are_refused(calls):
    plan = handmade_plan(TinyDenoiser(), bits=9)
    with pytest.raises(DQError, match=r"'time_in'.*9 bits"):
        export_onnx_qcdq(BrevitasAdapter().apply(TinyDenoiser(), plan), kwargs=calls[0])
