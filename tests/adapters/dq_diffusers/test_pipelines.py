from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
import torch
from dq_diffusers.recording import load_pipeline
from tiny_pipelines import class_pipeline, quiet, text_pipeline
from torch import nn

from dq_plugins.errors import DQError, MissingDependencyError

CASES = [(class_pipeline, "transformer", [0, 2]), (text_pipeline, "unet", ["red fox", "fox"])]


def draw(pipe, conditions, seed=0, steps=3, output_type="pt", **options):
    rng = torch.Generator().manual_seed(seed)
    return pipe(conditions, num_inference_steps=steps, generator=rng, output_type=output_type, **options).images


def calls_of(denoiser: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(sample, timestep) of every call that follows."""
    calls = []

    def keep(_, args, kwargs):
        calls.append((args[0], kwargs["timestep"] if "timestep" in kwargs else args[1]))

    denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    return calls


@pytest.mark.parametrize(("make", "denoiser", "conditions"), CASES)
def test_the_seed_decides_the_samples(make, denoiser, conditions):
    pipe = make()
    assert torch.equal(draw(pipe, conditions, seed=1), draw(pipe, conditions, seed=1))
    assert not torch.equal(draw(pipe, conditions, seed=1), draw(pipe, conditions, seed=2))


@pytest.mark.parametrize(("make", "denoiser", "conditions"), CASES)
def test_one_generator_an_image_makes_it_independent_of_its_batch(make, denoiser, conditions):
    pipe, rngs = make(), [torch.Generator().manual_seed(i) for i in range(2)]
    both = pipe(conditions, num_inference_steps=3, generator=rngs, output_type="pt").images
    assert torch.allclose(draw(pipe, conditions[1:], seed=1), both[1:], atol=1e-5)


@pytest.mark.parametrize(("make", "denoiser", "conditions"), CASES)
@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 2), (2.0, 4)])
def test_guidance_is_one_call_a_step_with_twice_the_rows(make, denoiser, conditions, guidance, rows):
    pipe = make()
    calls = calls_of(getattr(pipe, denoiser))
    draw(pipe, conditions, guidance_scale=guidance)
    assert [len(sample) for sample, _ in calls] == [rows] * 3
    shape = (rows,) if denoiser == "transformer" else ()  # as the diffusers pipelines of these models call them
    assert all(isinstance(t, torch.Tensor) and t.shape == shape for _, t in calls)
    assert [int(t.flatten()[0]) for _, t in calls] == pipe.scheduler.timesteps.tolist()


def test_class_guidance_extrapolates_from_the_null_class():
    pipe = class_pipeline()
    images = draw(pipe, [0, 2], seed=4, guidance_scale=3.0)
    sample = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    for t in pipe.scheduler.timesteps:
        with torch.no_grad():
            null, conditional = (
                pipe.transformer(sample, timestep=t.expand(2), class_labels=torch.tensor(labels)).sample
                for labels in ([3, 3], [0, 2])
            )
        sample = pipe.scheduler.step(null + 3.0 * (conditional - null), t, sample).prev_sample
    assert torch.allclose(images, (sample / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_text_guidance_extrapolates_from_the_empty_prompt():
    pipe = text_pipeline()
    images = draw(pipe, "fox", seed=4, guidance_scale=3.0)
    sample = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    for t in pipe.scheduler.timesteps:
        with torch.no_grad():
            null, conditional = (pipe.unet(sample, t, pipe.encode_prompt([text])).sample for text in ("", "fox"))
        sample = pipe.scheduler.step(null + 3.0 * (conditional - null), t, sample).prev_sample
    assert torch.allclose(images, (sample / 2 + 0.5).clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize(("make", "denoiser", "conditions"), CASES)
def test_the_condition_changes_the_samples(make, denoiser, conditions):
    pipe = make()
    assert not torch.allclose(draw(pipe, conditions[:1]), draw(pipe, conditions[1:]), atol=1e-4)


def test_output_types_hold_the_same_image():
    pipe = text_pipeline()
    tensor, array, (image,) = (draw(pipe, "fox", output_type=kind) for kind in ("pt", "np", "pil"))
    assert tensor.shape == (1, 3, 4, 4)
    assert array.shape == (1, 4, 4, 3)
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(image), (array[0] * 255).round().astype("uint8"))
    assert torch.equal(draw(pipe, "fox"), pipe("fox", 3, generator=torch.manual_seed(0), output_type="pt",
                                               return_dict=False)[0])  # fmt: skip


def test_blocks_of_pixels_are_unfolded():
    pipe, seen = text_pipeline(block=2), []
    image = draw(pipe, "fox", callback_on_step_end=lambda *step: seen.append(step[3]["latents"]))
    assert image.shape == (1, 3, 8, 8)
    expected = nn.functional.pixel_shuffle(seen[-1], 2)
    assert torch.equal(image, (expected / 2 + 0.5).clamp(0, 1))


def test_the_callback_sees_every_step_and_may_change_the_sample():
    pipe, seen = class_pipeline(), []

    def callback(owner, index, t, values):
        assert owner is pipe
        seen.append((index, int(t)))
        return {"latents": torch.ones_like(values["latents"])} if index == 2 else None

    images = draw(pipe, [0], callback_on_step_end=callback)
    assert seen == list(enumerate(pipe.scheduler.timesteps.tolist()))
    assert torch.equal(images, torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize(("make", "denoiser", "conditions"), [*CASES, (lambda: text_pipeline(2), "unet", ["fox"])])
def test_a_saved_pipeline_samples_the_same(make, denoiser, conditions, tmp_path):
    pipe = make()
    pipe.save_pretrained(tmp_path)
    for loaded in (type(pipe).from_pretrained(tmp_path), load_pipeline(tmp_path)):
        assert type(loaded) is type(pipe)
        assert torch.equal(draw(quiet(loaded), conditions), draw(pipe, conditions))


def test_weights_stored_in_float16_load_as_float32(tmp_path):
    pipe = class_pipeline()
    pipe.transformer.half()
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path).transformer
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_the_loader_leaves_other_pipelines_to_diffusers(tmp_path):
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(sample_size=4, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks)
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    assert type(load_pipeline(tmp_path)) is DDPMPipeline


def test_wrong_arguments_name_the_culprit(tmp_path):
    with pytest.raises(DQError, match=r"\[3\].*classes 0 to 2"):
        class_pipeline()([0, 3])
    with pytest.raises(DQError, match="'jpeg' is unknown"):
        text_pipeline()("fox", output_type="jpeg")
    with pytest.raises(DQError, match=r"model_index\.json is missing"):
        load_pipeline(tmp_path)


def test_without_diffusers_the_error_says_how_to_install_it(monkeypatch):
    import dq_diffusers

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'dq-plugins\[diffusers\]'"):
        importlib.reload(dq_diffusers)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dq_diffusers.nonsense  # noqa: B018
