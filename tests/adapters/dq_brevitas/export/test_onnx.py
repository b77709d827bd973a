from __future__ import annotations

import pytest
import torch
from brevitas import quant as stock

from dq_brevitas import BrevitasAdapter, attach_timesteps, export_onnx_qcdq, quantizers
from dq_plugins.errors import DQError
from dq_plugins.testing.denoiser import TIMESTEPS, TinyDenoiser
from dq_plugins.testing.plans import handmade_plan
from dq_plugins.timesteps import TimestepGroups

onnxruntime = pytest.importorskip("onnxruntime")
PER_TIMESTEP = TimestepGroups.one_per_timestep(TIMESTEPS)


def run(model, call):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in call.items()})[0])


def grouped(name, quantize, calibrate):
    if name == "plan":
        return BrevitasAdapter().apply(TinyDenoiser(), handmade_plan(TinyDenoiser(), bits=6))
    return calibrate(attach_timesteps(quantize(getattr(quantizers, name), input_bit_width=6), PER_TIMESTEP))


@pytest.mark.parametrize("name", ["ShiftedUint8ActPerTimestepFloat", "plan"])
def test_onnxruntime_agrees_at_every_group(name, quantize, calibrate, calls, tmp_path):
    model = grouped(name, quantize, calibrate)
    exported = export_onnx_qcdq(model, kwargs=calls[0], path=tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").is_file()
    assert [i.name for i in exported.graph.input] == ["sample", "timestep", "condition"]
    kinds = [node.op_type for node in exported.graph.node]
    assert kinds.count("GreaterOrEqual") == 1, "the group is found once in the graph"
    assert kinds.count("QuantizeLinear") >= 8
    assert kinds.count("Gather") >= 8, "every quantizer looks its scale up"
    groups = set()
    for call in calls:
        expected = model(**call)
        torch.testing.assert_close(run(exported, call), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
        groups.add(PER_TIMESTEP.of(float(call["timestep"])))
    assert groups == set(range(5))


def test_one_timestep_per_sample(quantize, calibrate, calls):
    model = grouped("Int8ActPerTimestepFloat", quantize, calibrate)
    batches = [{k: torch.cat([c[k][:1] for c in order]) for k in calls[0]} for order in (calls, calls[::-1])]
    exported = export_onnx_qcdq(model, kwargs=batches[0])
    for batch in batches:
        expected = model(**batch)
        torch.testing.assert_close(run(exported, batch), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_widths_that_onnx_lacks_are_refused(quantize, calibrate, calls):
    plan = handmade_plan(TinyDenoiser(), bits=9)
    with pytest.raises(DQError, match=r"'time_in'.*9 bits"):
        export_onnx_qcdq(BrevitasAdapter().apply(TinyDenoiser(), plan), kwargs=calls[0])


def test_a_model_without_timestep_groups_exports_as_before(quantize, calibrate, calls):
    model = calibrate(quantize(stock.Int8ActPerTensorFloat))
    exported = export_onnx_qcdq(model, kwargs=calls[0])
    expected = model(**calls[0])
    torch.testing.assert_close(run(exported, calls[0]), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
