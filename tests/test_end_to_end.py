"""The bundled transformer from full precision to integers, and again in another process."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dq_plugins as dq
from dq_plugins.bundled_denoisers import bundled
from dq_plugins.metrics.output_error import output_sqnr
from dq_plugins.plan import LayerPlan, Reason
from dq_plugins.report.execution import executions

SAMPLE = """
import sys, numpy as np, dq_plugins as dq
from dq_diffusers.recording import denoiser_of, load_pipeline, sampler

model, plan, out = sys.argv[1:]
pipe = load_pipeline(model)
_, denoiser = denoiser_of(pipe)
quantized = dq.apply(denoiser, dq.QuantPlan.load(plan), backend="torchao")
batches = sampler(pipe, steps=4, images=3, seed=50, batch=3)(quantized)
np.save(out, np.concatenate([np.asarray(b.images) for b in batches]))
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    from dq_diffusers.recording import denoiser_of, load_pipeline, sampler

    folder = tmp_path_factory.mktemp("end-to-end")
    pipe = load_pipeline(bundled("digits"))
    _, denoiser = denoiser_of(pipe)
    denoiser.eval().requires_grad_(False)
    calibration = dq.record(denoiser, sampler(pipe, steps=4, images=4), folder / "calib", progress=False)
    plan = dq.make_plan(denoiser, calibration, "default", progress=False)
    plan.save(folder / "plan")
    return pipe, denoiser, calibration, plan, folder


def sample(case, denoiser) -> np.ndarray:
    from dq_diffusers.recording import sampler

    batches = sampler(case[0], steps=4, images=3, seed=50, batch=3)(denoiser)
    return np.concatenate([np.asarray(b.images) for b in batches])


def test_another_process_reproduces_the_same_samples_bit_for_bit(case) -> None:
    _, denoiser, _, plan, folder = case
    here = sample(case, dq.apply(denoiser, plan, backend="torchao"))
    script, out = folder / "sample.py", folder / "images.npy"
    script.write_text(SAMPLE)
    command = [sys.executable, script, bundled("digits"), folder / "plan", out]
    subprocess.run(command, check=True, capture_output=True, text=True)
    assert np.array_equal(np.load(out), here)


def test_eight_bits_stay_close_and_run_in_integers(case) -> None:
    _, denoiser, calibration, plan, _ = case
    model = dq.apply(denoiser, plan, backend="torchao")
    assert min(output_sqnr(model, calibration).values()) > 25
    states = [e.state for e in executions(model, plan).values()]
    assert states.count("integer") >= 30
    error = np.mean((sample(case, model) - sample(case, denoiser)) ** 2)
    assert 10 * np.log10(1 / error) > 30


def test_integers_and_simulation_agree(case) -> None:
    _, denoiser, calibration, plan, _ = case
    integer, simulated = (dq.apply(denoiser, plan, backend=b) for b in ("torchao", "simulate"))
    for call in calibration.calls():
        a, b = call.run(integer), call.run(simulated)
        assert (a - b).square().sum() < 1e-4 * b.square().sum()


def test_every_kind_of_correction_is_in_the_plan_and_comes_back_from_disk_bit_for_bit(case, tmp_path: Path) -> None:
    import dq_torchao

    _, denoiser, calibration, plan, _ = case
    assert {"balance", "bias_correction"} <= plan.features.keys()
    integer = dq.apply(denoiser, plan, backend="torchao")
    dq_torchao.save(integer, tmp_path)
    loaded = dq_torchao.load(copy.deepcopy(denoiser), tmp_path)
    assert all(torch.equal(call.run(integer), call.run(loaded)) for call in calibration.calls())


def test_brevitas_and_simulation_agree(case) -> None:
    _, denoiser, calibration, plan, _ = case
    plan = copy.deepcopy(plan)
    for name, layer in plan.layers.items():  # Brevitas has no embeddings
        if layer.kind == "embedding":
            plan.layers[name] = LayerPlan(layer.kind, unquantized_reason=Reason("kept"))
    brevitas, simulated = (dq.apply(denoiser, plan, backend=b) for b in ("brevitas", "simulate"))
    for call in calibration.calls():
        a, b = call.run(brevitas), call.run(simulated)
        assert (a - b).square().sum() < 1e-6 * b.square().sum()


def test_fewer_bits_more_error(case) -> None:
    _, denoiser, calibration, _, _ = case
    worst = []
    for bits in (8, 6, 4):
        plan = dq.make_plan(denoiser, calibration, "default", weight_bits=bits, act_bits=bits, progress=False)
        worst.append(min(output_sqnr(dq.apply(denoiser, plan, backend="simulate"), calibration).values()))
    assert worst == sorted(worst, reverse=True)


def test_calibrating_twice_gives_the_same_plan(case, tmp_path: Path) -> None:
    from dq_diffusers.recording import sampler

    pipe, denoiser, _, plan, _ = case
    again = dq.record(denoiser, sampler(pipe, steps=4, images=4), tmp_path, progress=False)
    assert dq.make_plan(denoiser, again, "default", progress=False) == plan
    assert torch.is_tensor(next(again.calls()).output)
