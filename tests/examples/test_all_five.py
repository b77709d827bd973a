"""The five methods in one plan, as examples/all_five.py stacks them, on an untrained transformer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import dq_diffusers
import dq_torchao
import pytest
import torch
from diffusers_models import class_pipeline
from dq_diffusers.recording import sampler
from interruptions import interrupted_after
from torchao_models import sqnr

import dq_plugins as dq

EXAMPLE = Path(__file__).parents[2] / "examples" / "all_five.py"


def example():
    spec = importlib.util.spec_from_file_location("all_five", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    pipe = class_pipeline()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=False)
    denoiser = pipe.transformer.requires_grad_(False)
    folder = tmp_path_factory.mktemp("all-five")
    calibration = dq.record(denoiser, sampler(pipe, steps=8, images=2), folder / "calibration", progress=False)
    return pipe, denoiser, calibration, make(denoiser, calibration)


def make(denoiser, calibration, **options):
    recipe = example().recipe((4, 3), effort=1)
    return dq.make_plan(denoiser, calibration, recipe, weight_bits=1, act_bits=6, progress=False, **options)


def test_every_method_leaves_its_mark(case):
    _, _, calibration, plan = case
    assert len(plan.sampling) in (3, 4)
    assert set(plan.sampling.timesteps) <= set(calibration.timesteps)
    found = plan.sections["timestep-reduction"].data
    assert found["cost"] <= found["budget"]
    weights = [layer.weight for layer in plan.layers.values() if layer.weight is not None]
    assert any(not w.rounds for w in weights)  # BinaryDM's one bit
    assert len({w.bits for w in weights}) > 1
    assert any(w.codes is not None for w in weights)  # TFMQ-DM's rounding
    assert (
        plan.sections["temporal-reconstruction"].data["after"]
        != plan.sections["temporal-reconstruction"].data["before"]
    )
    assert any(len(groups) > 1 for groups in plan.groups.values())


def test_the_plan_survives_the_disk_and_runs_in_integers(case, tmp_path):
    _, denoiser, calibration, plan = case
    loaded = dq.QuantPlan.load(plan.save(tmp_path))
    assert loaded == plan
    quantized = dq.apply(denoiser, loaded, "torchao")
    simulated = dq.apply(denoiser, loaded, "simulate")
    visited = [c for c in calibration.calls() if float(c.timestep.reshape(-1)[0]) in plan.sampling.timesteps]
    assert len(visited) == len(plan.sampling)
    for call in visited:
        with torch.no_grad():
            assert sqnr(call.run(simulated), call.run(quantized)) > 35
    states = {e.state for e in dq_torchao.execution_report(quantized).values()}
    assert "integer" in states
    assert "simulated" not in states


def test_sampling_visits_what_was_chosen(case):
    _, denoiser, _, plan = case
    pipe = class_pipeline(dq.apply(denoiser, plan, "torchao"))
    dq_diffusers.install_schedule(pipe, plan)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=[1, 2], num_inference_steps=50, output_type="pt").images
    assert torch.isfinite(images).all()
    assert tuple(float(t) for t in pipe.scheduler.timesteps) == plan.sampling.timesteps


def test_interrupted_in_the_middle_it_ends_with_the_same_plan(case, tmp_path, monkeypatch):
    _, denoiser, calibration, plan = case
    with interrupted_after(3, monkeypatch), pytest.raises(KeyboardInterrupt):
        make(denoiser, calibration, workdir=tmp_path)
    assert make(denoiser, calibration, workdir=tmp_path) == plan
