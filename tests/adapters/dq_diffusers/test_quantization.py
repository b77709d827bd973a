from __future__ import annotations

import dq_diffusers
import dq_torchao
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from diffusers_models import class_pipeline, unet
from dq_diffusers.quantization import prompts_of
from dq_diffusers.recording import load_pipeline
from torchao_models import sqnr

import dq_plugins as dq
from dq_plugins.bundled_denoisers import bundled
from dq_plugins.errors import DQError
from dq_plugins.recipe import Recipe, Step
from dq_plugins.timesteps import context_of

FEW = {"steps": 3, "images": 2, "progress": False}


def test_the_denoiser_is_quantized_in_place_and_runs_in_integers():
    pipe, reference = class_pipeline(), class_pipeline()
    denoiser = pipe.transformer
    plan = dq_diffusers.quantize(pipe, options={"timestep-groups": {"groups": 2}}, **FEW)
    assert pipe.transformer is denoiser
    states = [e.state for e in dq_torchao.execution_report(denoiser).values()]
    assert states.count("integer") >= 0.8 * len(states)
    assert [len(g) for g in context_of(denoiser).groups.values()] == [len(g) for g in plan.groups.values()]
    images = [
        p(class_labels=[1, 2], num_inference_steps=3, generator=torch.manual_seed(9), output_type="pt").images
        for p in (reference, pipe)
    ]
    assert sqnr(*images) > 20


def test_it_is_make_plan_and_apply(tmp_path):
    pipe, by_hand = class_pipeline(), class_pipeline()
    options = {"timestep-groups": {"groups": 2}}
    plan = dq_diffusers.quantize(
        pipe, "fast", weight_bits=4, act_bits=6, seed=5, options=options, workdir=tmp_path, **FEW
    )
    calibration = dq.calibration.CalibrationSet.open(tmp_path / "calib")
    assert len(calibration.timesteps) == 3
    denoiser = by_hand.transformer
    made = dq.make_plan(
        denoiser, calibration, "fast", weight_bits=4, act_bits=6, seed=5, options=options, progress=False
    )
    assert made == plan
    dq_torchao.apply(denoiser, plan)
    args = {"timestep": torch.tensor(calibration.timesteps[:1]), "class_labels": torch.tensor([1])}
    outputs = [model(torch.ones(1, 3, 8, 8), **args).sample for model in (pipe.transformer, denoiser)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("backend_options", [{}, {"uniform_timesteps": False}])
def test_a_batch_has_one_timestep_unless_told_otherwise(backend_options):
    pipe = class_pipeline()
    plan = dq_diffusers.quantize(pipe, **FEW, **backend_options)
    low, high = plan.schedule.sorted[0], plan.schedule.sorted[-1]
    each = {"timestep": torch.tensor([low, high]), "class_labels": torch.tensor([1, 2])}
    if backend_options:
        assert pipe.transformer(torch.ones(2, 3, 8, 8), **each).sample.isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="uniform_timesteps=False"):
            pipe.transformer(torch.ones(2, 3, 8, 8), **each)


def test_an_interrupted_call_is_resumed(tmp_path, monkeypatch):
    pipe = class_pipeline()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dq_diffusers.quantization.make_plan", interrupt)
        with pytest.raises(KeyboardInterrupt):
            dq_diffusers.quantize(pipe, "fast", workdir=tmp_path, **FEW)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "calib").glob("*.safetensors")}
    dq_diffusers.quantize(pipe, "fast", workdir=tmp_path, **FEW)
    assert before
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "calib").glob("*.safetensors")} == before


def test_tuning_leaves_in_floating_point_what_is_faster_there(monkeypatch):
    slow = dq_torchao.Timing(integer=2.0, floating=1.0)
    monkeypatch.setattr("dq_torchao.tuning.time_layer", lambda *_: slow)
    pipe = class_pipeline()
    with pytest.warns(UserWarning, match="gains nothing"):
        dq_diffusers.quantize(pipe, "fast", prefer="fastest", **FEW)
    states = [e.state for e in dq_torchao.execution_report(pipe.transformer).values()]
    assert "full precision" in states
    assert "integer" not in states


def test_only_integers_can_be_faster():
    with pytest.raises(DQError, match="runs no integers"):
        dq_diffusers.quantize(class_pipeline(), "fast", prefer="fastest", backend="simulate", **FEW)


def test_options_of_the_backend_are_looked_at_before_anything_is_recorded(monkeypatch):
    monkeypatch.setattr("dq_diffusers.quantization.record", lambda *_, **__: pytest.fail("recorded"))
    with pytest.raises(DQError, match="takes no option 'uniform_timestep'; did you mean 'uniform_timesteps'"):
        dq_diffusers.quantize(class_pipeline(), "fast", uniform_timestep=True, **FEW)


def test_the_former_name_of_prefer_is_understood():
    with pytest.warns(DeprecationWarning, match="is now prefer='smallest'"):
        dq_diffusers.quantize(class_pipeline(), "fast", tune=False, **FEW)


def test_activations_may_stay_in_floating_point():
    pipe = DDIMPipeline(unet(), DDIMScheduler())
    dq_diffusers.quantize(pipe, "fast", weight_bits=4, act_bits=None, **FEW)
    widths = {e.width for e in dq_torchao.execution_report(pipe.unet).values()}
    assert "W4A32" in widths
    assert not any(width.endswith("A8") for width in widths)


def test_another_backend():
    pipe = DDIMPipeline(unet(), DDIMScheduler())
    dq_diffusers.quantize(pipe, "fast", backend="simulate", out_of_range="nearest", **FEW)
    assert pipe.unet.conv_in.input_quantizer.bits == 8
    assert context_of(pipe.unet).out_of_range == "nearest"


def test_a_quantized_pipeline_is_refused():
    pipe = class_pipeline()
    dq_diffusers.quantize(pipe, "fast", **FEW)
    with pytest.raises(DQError, match="is quantized already: a plan, or the calibration for one"):
        dq_diffusers.quantize(pipe, "fast", **FEW)


def test_prompts_come_with_the_pipeline():
    prompts = prompts_of(load_pipeline(bundled("emoji")))
    assert prompts
    assert all(prompts)
    assert prompts_of(class_pipeline()) is None


def test_integer_attention_is_saved_and_loaded(tmp_path):
    steps = ("weight-ranges", "timestep-groups", "activation-ranges", "attention-ranges")
    pipe = class_pipeline()
    plan = dq_diffusers.quantize(pipe, Recipe("attention", "", tuple(Step(name) for name in steps)), **FEW)
    assert all(attention.quantized for attention in plan.attention.values())
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(str(tmp_path))
    call = {"class_labels": [1, 2], "num_inference_steps": 3, "output_type": "np"}
    images = [each(generator=torch.Generator().manual_seed(0), **call).images for each in (pipe, loaded)]
    assert (images[0] == images[1]).all()
    report = dq_torchao.execution_report(loaded.transformer)
    assert {report[name].state for name in plan.attention} == {"integer"}
