from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler, UNet2DModel
from dq_diffusers.pipelines import PixelClassConditionalPipeline
from dq_diffusers.recording import denoiser_of, load_pipeline, sampler
from dq_diffusers.stepping import DiffusersStepper
from tiny_pipelines import class_pipeline, text_pipeline

from dq_plugins.calibration import CalibrationSet, record
from dq_plugins.calibration.prompts import PROMPTS
from dq_plugins.errors import DQError


def unconditional() -> DDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    return DDPMPipeline(unet, DDIMScheduler())


def recorded(pipe, tmp_path, **options):
    _, denoiser = denoiser_of(pipe)
    sample = sampler(pipe, steps=3, **options)
    return record(denoiser, sample, tmp_path, total=sample.total, progress=False), sample


@pytest.mark.parametrize(("make", "name"), [(unconditional, "unet"), (class_pipeline, "transformer")])
def test_the_denoiser_is_the_component_that_takes_a_timestep(make, name):
    pipe = make()
    assert denoiser_of(pipe) == (name, getattr(pipe, name))


def test_a_pipeline_without_one_is_an_error():
    pipe = unconditional()
    pipe.register_modules(unet=torch.nn.Linear(1, 1))
    with pytest.raises(DQError, match="no single component that takes a timestep"):
        denoiser_of(pipe)


@pytest.mark.parametrize(
    ("make", "conditions"),
    [(unconditional, {}), (class_pipeline, {}), (text_pipeline, {"prompts": ["red fox", "fox"]})],
)
def test_a_recording_of_any_pipeline_can_be_checked_by_running_it_again(make, conditions, tmp_path):
    calib, sample = recorded(make(), tmp_path, images=3, batch=2, **conditions)
    assert len(calib) == sample.total == 6
    again, _ = recorded(make(), tmp_path, images=3, batch=2, **conditions)
    assert again.hash == calib.hash
    _, denoiser = denoiser_of(make())
    assert all(torch.allclose(call.run(denoiser.eval()), call.output) for call in calib.calls())


def test_noise_belongs_to_the_image_and_not_to_the_batch(tmp_path):
    one, _ = recorded(unconditional(), tmp_path / "one", images=3, batch=3, seed=5)
    two, _ = recorded(unconditional(), tmp_path / "two", images=3, batch=1, seed=5)
    first = next(one.calls()).kwargs["sample"]
    firsts = [call.kwargs["sample"] for call in two.calls(one.timesteps[-1])]
    assert torch.equal(first, torch.cat(firsts))


def test_classes_default_to_all_in_turn_and_can_be_given(tmp_path):
    calib, _ = recorded(class_pipeline(), tmp_path / "all", images=4, guidance_scale=1.0)
    assert next(calib.calls()).kwargs["class_labels"].tolist() == [0, 1, 2, 0]
    calib, _ = recorded(class_pipeline(), tmp_path / "some", images=4, class_labels=[2, 1], guidance_scale=1.0)
    assert next(calib.calls()).kwargs["class_labels"].tolist() == [2, 1, 2, 1]


def test_text_models_draw_built_in_prompts_unless_told_otherwise():
    assert sampler(text_pipeline(), images=3).conditions["prompt"] == list(PROMPTS[:3])
    assert sampler(text_pipeline(), images=3, prompts=["fox"]).conditions["prompt"] == ["fox"] * 3
    assert len(sampler(text_pipeline(), images=40).conditions["prompt"]) == 40


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (text_pipeline, {"class_labels": [1]}, "takes no class_labels; it takes: prompt"),
        (unconditional, {"prompts": ["fox"]}, "takes no prompt; it takes: no condition"),
        (text_pipeline, {"prompts": []}, "empty list of prompt"),
        (unconditional, {"guidance_scale": 2.0}, "takes no 'guidance_scale'"),
        (unconditional, {"images": 0}, "at least 1"),
    ],
)
def test_wrong_conditions_are_errors(make, options, message):
    with pytest.raises(DQError, match=message):
        sampler(make(), **options)


def test_another_denoiser_takes_the_place_only_while_sampling():
    pipe = class_pipeline()
    original, calls = pipe.transformer, []
    other = class_pipeline().transformer
    other.register_forward_hook(lambda *_: calls.append(1))
    (output,) = sampler(pipe, steps=2, images=1)(other)
    assert len(calls) == 2
    assert output.images.shape == (1, 4, 4, 1)
    assert pipe.transformer is original


def test_a_saved_pipeline_loads_and_a_missing_one_is_an_error(tmp_path):
    class_pipeline().save_pretrained(tmp_path / "pipe")
    assert isinstance(load_pipeline(tmp_path / "pipe"), PixelClassConditionalPipeline)
    with pytest.raises(DQError, match="no pipeline"):
        load_pipeline(tmp_path)


def test_a_scheduler_with_an_infinite_number_in_its_config_is_recorded_and_made_again(tmp_path):
    pipe = unconditional()
    pipe.scheduler = DPMSolverMultistepScheduler()
    calib, _ = recorded(pipe, tmp_path, images=1)
    made = DiffusersStepper(CalibrationSet.open(tmp_path).sampler["scheduler"]).scheduler
    assert made.config.lambda_min_clipped == pipe.scheduler.config.lambda_min_clipped == float("-inf")
    assert len(calib) == 3
