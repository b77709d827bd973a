"""Pipelines of diffusers for other tasks than text to image, with the arguments of their own calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import dq_diffusers
import dq_torchao
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from dq_diffusers.recording import denoisers_of
from PIL import Image
from tiny_pipelines import latent_parts, quiet, tokenizer, wan_transformer, wan_vae
from torch import Tensor

from dq_plugins.cli import main

FEW: dict[str, Any] = {"steps": 2, "images": 1, "progress": False}
PICTURE = Image.fromarray(np.random.RandomState(0).randint(0, 255, (8, 8, 3)).astype("uint8"))
MASK = Image.fromarray(np.full((8, 8), 255, "uint8"))
SMALL = {"height": 8, "width": 8}
VIDEO = {
    "height": 16, "width": 16, "num_frames": 9, "prompt_embeds": torch.randn(1, 6, 16),
    "negative_prompt_embeds": torch.zeros(1, 6, 16),
}  # fmt: skip


def image_to_image() -> Any:
    return diffusers.StableDiffusionImg2ImgPipeline(**latent_parts(), requires_safety_checker=False)


def inpainting() -> Any:
    return diffusers.StableDiffusionInpaintPipeline(**latent_parts(9), requires_safety_checker=False)


def control() -> Any:
    parts = latent_parts()
    torch.manual_seed(3)
    net = diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 8))
    return diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False)


def text_and_image_to_video() -> Any:
    """The frame that is given has timestep 0, the others that of the step: a timestep for every token."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return diffusers.WanImageToVideoPipeline(
        tokenizer(), None, wan_vae(), scheduler, transformer=wan_transformer(), expand_timesteps=True
    )


def two_experts() -> Any:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    experts = {"transformer": wan_transformer(), "transformer_2": wan_transformer(), "boundary_ratio": 0.875}
    return diffusers.WanPipeline(tokenizer(), None, wan_vae(), scheduler, **experts)


TASKS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "image to image": (image_to_image, {"image": PICTURE, "strength": 1.0}),
    "inpainting": (inpainting, {"image": PICTURE, "mask_image": MASK, **SMALL}),
    "ControlNet": (control, {"image": PICTURE, **SMALL}),
    "image to video, expanded timesteps": (text_and_image_to_video, {"image": PICTURE.resize((16, 16)), **VIDEO}),
    "Wan 2.2, two experts": (two_experts, VIDEO),
}


def draw(pipe: DiffusionPipeline, call: dict[str, Any]) -> Tensor:
    prompt = {} if "prompt_embeds" in call else {"prompt": "red fox"}
    generator = torch.Generator().manual_seed(0)
    out = quiet(pipe)(num_inference_steps=2, generator=generator, output_type="latent", **prompt, **call)
    return next(iter(out.values()))


@pytest.mark.parametrize("task", TASKS)
def test_all_denoisers_of_a_task_run_in_integers_and_are_loaded_bit_for_bit(task: str, tmp_path: Path) -> None:
    make, call = TASKS[task]
    pipe = make()
    full = draw(pipe, call)
    prompts = {} if "prompt_embeds" in call else {"prompts": ["red fox"]}
    dq_diffusers.quantize(pipe, "fast", call=call, **prompts, **FEW)
    for denoiser in denoisers_of(pipe).values():
        report = dq_torchao.execution_report(denoiser)
        assert {entry.state for entry in report.values()} == {"integer"}
    drawn = draw(pipe, call)
    assert 0 < (drawn - full).square().mean() < 0.2 * full.square().mean()
    pipe.save_pretrained(tmp_path)
    absent = {name: None for name, part in pipe.components.items() if part is None}
    assert torch.equal(draw(type(pipe).from_pretrained(tmp_path, **absent), call), drawn)


def test_the_command_line_takes_the_image_as_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_to_image().save_pretrained(tmp_path / "pipe")
    PICTURE.save(tmp_path / "start.png")
    given = ["--call", f"image={tmp_path / 'start.png'}", "--call", "strength=1.0", "--prompts", "red fox"]
    few = ["--recipe", "fast", "--steps", "2", "--images", "1"]
    assert main(["quantize", str(tmp_path / "pipe"), "--out", str(tmp_path / "run"), *given, *few]) == 0
    assert "pipeline written to" in capsys.readouterr().out
    loaded = type(image_to_image()).from_pretrained(tmp_path / "run" / "pipeline")
    assert draw(loaded, {"image": PICTURE, "strength": 1.0}).isfinite().all()
