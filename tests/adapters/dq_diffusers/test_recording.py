from __future__ import annotations

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
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


class Recites:
    """A pipeline of nothing but a call, which keeps what it was called with."""

    def __init__(self, pipe):
        self.pipe, self.calls = pipe, []
        self.components, self.scheduler = pipe.components, pipe.scheduler

    def set_progress_bar_config(self, **_):
        pass

    def __call__(
        self, prompt=None, negative_prompt=None, prompt_embeds=None, negative_prompt_embeds=None, prompt_2=None,
        image=None, num_images_per_prompt=1, num_inference_steps=3, generator=None,
    ):  # fmt: skip
        self.calls.append({k: v for k, v in locals().items() if k != "self"})

    @property
    def unet(self):
        return self.pipe.unet


def called(batch: int = 2, images: int = 3, **arguments) -> list[dict]:
    pipe = Recites(text_pipeline())
    sampler(pipe, images=images, batch=batch, steps=3, **arguments)(pipe.unet)
    return pipe.calls


def test_texts_are_those_of_each_image_whatever_the_batch():
    first, second = called(prompts=["fox"], negative_prompt="red", prompt_2=["a", "b"], image="one for all")
    assert (first["negative_prompt"], second["negative_prompt"]) == (["red", "red"], ["red"])
    assert (first["prompt_2"], second["prompt_2"]) == (["a", "b"], ["a"])
    assert (first["image"], second["image"]) == ("one for all", "one for all")
    assert [each["prompt"] for each in called(prompt="red fox")] == [["red fox"] * 2, ["red fox"]]


def test_embeddings_stand_in_for_prompts_row_by_row():
    embeds = torch.arange(2.0).reshape(2, 1, 1).expand(2, 4, 8)
    first, second = called(prompt_embeds=embeds, negative_prompt_embeds=embeds[:1])
    assert first["prompt"] is None
    assert torch.equal(first["prompt_embeds"], embeds)
    assert torch.equal(second["prompt_embeds"], embeds[:1])
    assert torch.equal(first["negative_prompt_embeds"], embeds[:1].repeat(2, 1, 1))


def test_every_image_of_a_prompt_has_noise_of_its_own():
    first, second = called(num_images_per_prompt=2, prompts=["fox"], seed=10)
    seeds = [each.initial_seed() for each in (*first["generator"], *second["generator"])]
    assert seeds == list(range(10, 16))


def test_parts_of_a_sampler_are_the_whole():
    whole = sampler(Recites(text_pipeline()), images=5, batch=2, steps=3)
    assert whole.batches == 3
    pipe = whole.pipe
    whole(pipe.unet)
    expected, pipe.calls = pipe.calls, []
    for start, stop in ((0, 1), (1, 3)):
        assert whole.part(start, stop).batches == stop - start
        whole.part(start, stop)(pipe.unet)
    assert [call["prompt"] for call in pipe.calls] == [call["prompt"] for call in expected]
    seeds = [[g.initial_seed() for call in calls for g in call["generator"]] for calls in (expected, pipe.calls)]
    assert seeds[0] == seeds[1] == list(range(5))


def test_what_goes_wrong_inside_a_pipeline_names_the_arguments():
    pipe = text_pipeline()
    with pytest.raises(DQError, match="PixelTextToImagePipeline cannot be sampled with the arguments .*guidance_scale"):
        sampler(pipe, images=1, steps=1, guidance_scale="much")(pipe.unet)


def test_a_generator_that_was_given_starts_the_same_every_time():
    pipe = Recites(text_pipeline())
    given = torch.Generator().manual_seed(7)
    sample = sampler(pipe, images=3, batch=2, steps=3, generator=given)
    assert sample.batches == 1  # the second batch goes on where the first ended
    for _ in range(2):
        sample(pipe.unet)
        torch.rand(3, generator=pipe.calls[-1]["generator"])
    seeds = {call["generator"].initial_seed() for call in pipe.calls}
    assert seeds == {7}
    assert pipe.calls[0]["generator"] is pipe.calls[1]["generator"]
    assert torch.equal(given.get_state(), torch.Generator().manual_seed(7).get_state())


def test_a_pipeline_that_can_do_without_classes_does_where_its_denoiser_knows_none():
    pipe = ConsistencyModelPipeline(unconditional().unet, CMStochasticIterativeScheduler(40))
    sample = sampler(pipe, images=3, batch=2, steps=2)
    assert sample.conditions == {}
    assert [len(output.images) for output in sample(pipe.unet)] == [2, 1]
