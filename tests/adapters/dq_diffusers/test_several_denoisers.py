from __future__ import annotations

import copy
from typing import Any

import dq_diffusers
import dq_torchao
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers_models import class_pipeline, dit
from dq_diffusers.recording import denoiser_of, denoisers_of, sampler

from dq_plugins.cli import main
from dq_plugins.errors import CalibrationError, DQError
from dq_plugins.plan import QuantPlan

FEW: dict[str, Any] = {"steps": 4, "images": 2, "progress": False}


class Experts(DiffusionPipeline):
    """One transformer for the noisier timesteps, another for the rest."""

    def __init__(self, transformer, transformer_2, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, transformer_2=transformer_2, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, class_labels, num_inference_steps=4, generator=None, boundary=500):
        x = torch.cat([torch.randn(1, 3, 8, 8, generator=each) for each in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            denoiser = self.transformer if t >= boundary else self.transformer_2
            at = {"timestep": t.expand(len(x)), "class_labels": torch.tensor(class_labels)}
            x = self.scheduler.step(denoiser(x, **at).sample, t, x).prev_sample
        return x


def experts() -> Experts:
    pipe = Experts(dit(0), dit(1), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **more):
    return pipe(class_labels=[0, 1], generator=[torch.Generator().manual_seed(i) for i in range(2)], **more)


def integers(model) -> int:
    return [e.state for e in dq_torchao.execution_report(model).values()].count("integer")


def test_all_components_that_take_a_timestep_are_denoisers():
    pipe = experts()
    assert denoisers_of(pipe) == {"transformer": pipe.transformer, "transformer_2": pipe.transformer_2}
    assert denoiser_of(pipe) == ("transformer", pipe.transformer)


def test_one_module_under_two_names_is_quantized_once():
    pipe = experts()
    pipe.register_modules(transformer_2=pipe.transformer)
    plan = dq_diffusers.quantize(pipe, "fast", **FEW)
    assert isinstance(plan, QuantPlan)
    assert pipe.transformer_2 is pipe.transformer
    assert draw(pipe).isfinite().all()


def test_each_gets_a_plan_over_its_own_timesteps_saved_and_loaded_with_the_pipeline(tmp_path):
    pipe = experts()
    plans = dq_diffusers.quantize(pipe, "fast", **FEW)
    assert list(plans) == ["transformer", "transformer_2"]
    assert min(plans["transformer"].schedule.timesteps) >= 500 > max(plans["transformer_2"].schedule.timesteps)
    assert integers(pipe.transformer) > 5
    assert integers(pipe.transformer_2) > 5
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(Experts.from_pretrained(tmp_path)), draw(pipe))


def test_one_that_is_never_called_stays_in_full_precision_and_is_named():
    pipe = experts()
    with pytest.warns(UserWarning, match="'transformer_2': it stays in full precision"):
        plans = dq_diffusers.quantize(pipe, "fast", call={"boundary": 0}, **FEW)
    assert list(plans) == ["transformer"]
    assert integers(pipe.transformer) > 5
    assert integers(pipe.transformer_2) == 0


def test_a_sampler_that_never_calls_the_only_denoiser_is_an_error():
    with pytest.raises(CalibrationError, match="never called the denoiser"):
        dq_diffusers.quantize(class_pipeline(), "fast", draw=lambda pipe: None, progress=False)


def test_a_function_may_draw_the_calibration_images():
    pipe, by_arguments = experts(), experts()
    plans = dq_diffusers.quantize(pipe, "fast", draw=draw, progress=False)
    expected = dq_diffusers.quantize(by_arguments, "fast", class_labels=[0, 1], **FEW)
    assert plans == expected


def test_other_arguments_of_the_call_reach_the_pipeline(tmp_path):
    plans = dq_diffusers.quantize(experts(), "fast", call={"boundary": 200}, **FEW)
    assert min(plans["transformer"].schedule.timesteps) < 500


def test_arguments_that_the_call_does_not_take_or_cannot_use_are_named():
    with pytest.raises(DQError, match="takes no 'strength'; it takes: class_labels, num_inference_steps"):
        sampler(experts(), strength=0.5)
    with pytest.raises(DQError, match="Experts cannot be sampled with the arguments .*boundary"):
        dq_diffusers.quantize(experts(), "fast", call={"boundary": "high"}, **FEW)


def test_the_command_line_quantizes_all(tmp_path, monkeypatch, capsys):
    experts().save_pretrained(tmp_path / "pipe")
    monkeypatch.setattr("dq_diffusers.adapter.load_pipeline", lambda path: quiet(path))
    model, out = str(tmp_path / "pipe"), tmp_path / "out"
    few = ["--recipe", "fast", "--steps", "4", "--images", "2"]
    assert main(["quantize", model, "--out", str(out), *few]) == 0
    assert "transformer_2:" in capsys.readouterr().out
    plans = [QuantPlan.load(out / name / "plan") for name in ("transformer", "transformer_2")]
    assert min(plans[0].schedule.timesteps) > max(plans[1].schedule.timesteps)
    loaded = quiet(out / "pipeline")
    assert integers(loaded.transformer) > 5
    assert integers(loaded.transformer_2) > 5
    assert main(["record", model, "--out", str(tmp_path / "c"), "--component", "vae", *few[2:]]) == 2
    assert "has no denoiser 'vae'; it has transformer, transformer_2" in capsys.readouterr().err


def quiet(path) -> Experts:
    pipe = Experts.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TwoControls(Experts):
    """Two networks in one component without a config, as several ControlNets are."""

    def __init__(self, transformer, controlnet, scheduler):
        DiffusionPipeline.__init__(self)
        self.register_modules(transformer=transformer, controlnet=controlnet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, class_labels, num_inference_steps=4, generator=None):
        x = torch.cat([torch.randn(1, 3, 8, 8, generator=each) for each in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            at = {"timestep": t.expand(len(x)), "class_labels": torch.tensor(class_labels)}
            x = self.controlnet(x, **at)
            x = self.scheduler.step(self.transformer(x, **at).sample, t, x).prev_sample
        return x


class Several(torch.nn.Module):
    def __init__(self, nets):
        super().__init__()
        self.nets = torch.nn.ModuleList(nets)

    def forward(self, x, timestep, class_labels):
        for net in self.nets:
            x = x + 0.1 * net(x, timestep, class_labels).sample
        return x


def test_several_networks_in_one_component_get_a_plan_each():
    pipe = TwoControls(dit(0), Several([dit(1), dit(2)]), DDIMScheduler())
    nets = pipe.controlnet.nets
    assert list(denoisers_of(pipe)) == ["transformer", "controlnet.nets.0", "controlnet.nets.1"]
    plans = dq_diffusers.quantize(pipe, "fast", **FEW)
    assert list(plans) == ["transformer", "controlnet.nets.0", "controlnet.nets.1"]
    assert [integers(net) > 5 for net in (pipe.transformer, *nets)] == [True] * 3
    assert pipe.controlnet.nets is nets
    assert draw(pipe).isfinite().all()


def test_a_copy_of_a_pipeline_is_recorded_without_touching_the_original():
    pipe = experts()
    before = copy.deepcopy(pipe.transformer.state_dict())
    sampler(pipe, steps=2, images=1, component="transformer_2")(copy.deepcopy(pipe.transformer_2))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), pipe.transformer.state_dict().values(), strict=True))
