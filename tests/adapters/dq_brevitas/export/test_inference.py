from __future__ import annotations

import pytest
import torch
from dq_brevitas import BrevitasAdapter, attach_timesteps, export_torch, inference_mode, quantizers

from dq_plugins.plan import WeightQuant
from dq_plugins.testing.denoiser import TIMESTEPS, TinyDenoiser
from dq_plugins.testing.plans import handmade_plan
from dq_plugins.timesteps import TimestepGroups

PER_TIMESTEP = TimestepGroups.one_per_timestep(TIMESTEPS)
KINDS = ["Int8ActPerTimestepFloat", "ShiftedUint8ActPerTimestepFloat"]


@pytest.fixture(params=[*KINDS, "plan"])
def model(request, quantize, calibrate):
    if request.param == "plan":
        return BrevitasAdapter().apply(TinyDenoiser(), handmade_plan(TinyDenoiser(), bits=6))
    act = getattr(quantizers, request.param)
    return calibrate(attach_timesteps(quantize(act, input_bit_width=6), PER_TIMESTEP))


def test_inference_mode_is_exact_for_every_group_and_for_mixed_batches(model, calls):
    batch = {key: torch.cat([call[key][:1] for call in calls]) for key in calls[0]}
    expected = [model(**call) for call in [*calls, batch]]
    with torch.no_grad(), inference_mode(model):
        model(**calls[0])
        assert model.up.input_quant.export_handler is not None, "the bare arithmetic must be what runs"
        found = [model(**call) for call in [*calls, batch]]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all(torch.equal(a, model(**call)) for a, call in zip(expected, calls, strict=False)), "restored afterwards"


def test_the_exported_program_holds_every_group(model, calls):
    program = export_torch(model, kwargs=calls[0])
    exported = program.module()
    assert all(torch.equal(model(**call), exported(**call)) for call in calls)
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("index_select" in name for name in names) >= 8, "the lookup must be in the graph"
    assert model.up.input_quant.export_handler is None, "the model itself is not changed"


def test_one_timestep_per_sample_exports_too(quantize, calibrate, calls):
    model = calibrate(attach_timesteps(quantize(quantizers.Int8ActPerTimestepFloat), PER_TIMESTEP))
    batches = [{k: torch.cat([c[k][:1] for c in order]) for k in calls[0]} for order in (calls, calls[::-1])]
    exported = export_torch(model, kwargs=batches[0]).module()
    assert all(torch.equal(model(**batch), exported(**batch)) for batch in batches)


def test_weights_of_a_plan_keep_their_arithmetic():
    """Where division and reciprocal round differently, inference must follow the plan."""
    scale = torch.tensor([0.0123])
    candidates = (torch.arange(-120, 120) + 0.5) * scale
    disagree = candidates[torch.round(candidates / scale) != torch.round(candidates * (1 / scale))]
    assert len(disagree), "no tie on which the two differ: the test would be empty"
    denoiser = TinyDenoiser()
    with torch.no_grad():
        denoiser.up.weight.copy_(disagree.repeat(512)[:512].reshape(32, 16))
    plan = handmade_plan(denoiser)
    plan.layers["up"].weight = WeightQuant(8, scale)
    model = BrevitasAdapter().apply(denoiser, plan)
    with torch.no_grad(), inference_mode(model):
        model(torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 6))
        found = model.up.weight_quant(model.up.weight)
    assert torch.equal(found, plan.layers["up"].weight.fake_quantize(disagree.repeat(512)[:512].reshape(32, 16)))
