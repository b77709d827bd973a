"""Two small pixel-space pipelines, for denoisers that work on images directly: text to image, and class to image.

They are ordinary diffusers pipelines (``save_pretrained``, ``from_pretrained``, ``to``, progress bar, step callback)
without an autoencoder. Classifier-free guidance runs as one batch of ``2 B`` rows, the unconditional half first:

    out = out_null + guidance_scale * (out_cond - out_null)        arXiv 2207.12598, eq. 6

Shapes: samples ``x`` are ``[B, C, H, W]`` in [-1, 1], of the denoiser's own size; images come back in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dq_diffusers.host import diffusers_attribute
from dq_plugins.errors import DQError, require

require("diffusers", "diffusers", "sample from a pipeline")
diffusers_attribute("DiffusionPipeline")  # the first import, which this makes a quiet one

from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin  # noqa: E402
from diffusers.utils.torch_utils import randn_tensor  # noqa: E402

StepCallback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], "dict[str, Tensor] | None"]


class _PixelPipeline(DiffusionPipeline):
    """The sampling loop that both pipelines share; a subclass says how the denoiser is called."""

    scheduler: SchedulerMixin

    def _sample(
        self,
        denoiser: nn.Module,
        predict: Callable[[Tensor, Tensor], Tensor],
        batch: int,
        steps: int,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        return_dict: bool,
        callback: StepCallback | None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Noise to images; ``predict(x, t)`` runs the denoiser on ``2 * batch`` rows when guidance is on."""
        size, channels = denoiser.config.sample_size, denoiser.config.in_channels
        shape = (batch, channels, size, size)
        sample = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=denoiser.dtype)
        self.scheduler.set_timesteps(steps, device=self._execution_device)
        sample = sample * self.scheduler.init_noise_sigma
        guided = guidance_scale > 1
        for index, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            rows = torch.cat([sample, sample]) if guided else sample
            output = predict(self.scheduler.scale_model_input(rows, t), t)
            if guided:
                null, conditional = output.chunk(2)
                output = null + guidance_scale * (conditional - null)
            sample = self.scheduler.step(output, t, sample, return_dict=False)[0]
            if callback is not None:
                changed = callback(self, index, t, {"latents": sample}) or {}
                sample = changed.get("latents", sample)
        sample = nn.functional.pixel_shuffle(sample, self.config.pixel_block)
        images: Any = (sample / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _check_output_type(output_type: str) -> None:
    if output_type not in ("pil", "pt", "np"):
        raise DQError(
            f"output_type {output_type!r} is unknown; it must be 'pil' (images), 'pt' (tensor [B, C, H, W]) "
            "or 'np' (array [B, H, W, C])."
        )


class PixelTextToImagePipeline(_PixelPipeline):
    """Text to image with a U-Net that works on pixels.

    Args:
        unet: a diffusers ``UNet2DConditionModel`` that cross-attends to the text.
        text_encoder: a transformers ``CLIPTextModel``.
        tokenizer: a transformers tokenizer whose ``model_max_length`` is the length of every prompt.
        scheduler: any diffusers scheduler with ``step``.
        pixel_block: the denoiser sees each ``k x k`` block of pixels as one position of ``k * k`` times the channels
            (``torch.nn.functional.pixel_unshuffle``); 1 is pixels as they are.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        unet: nn.Module,
        text_encoder: nn.Module,
        tokenizer: Any,
        scheduler: SchedulerMixin,
        pixel_block: int = 1,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
        self.register_to_config(pixel_block=pixel_block)

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Text states ``[len(prompts), length, width]``; the empty prompt stands for "no condition"."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(self._execution_device)).last_hidden_state

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 30,
        guidance_scale: float = 1.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample one image for each prompt.

        Args:
            prompt: one prompt or several.
            num_inference_steps: denoising steps.
            guidance_scale: weight of classifier-free guidance; 1 or less runs the denoiser without it.
            generator: one for the batch, or one for each image.
            output_type: ``"pil"``, ``"pt"`` (``[B, C, H, W]`` in [0, 1]) or ``"np"`` (``[B, H, W, C]``).
            return_dict: an ``ImagePipelineOutput`` where true, a tuple of one otherwise.
            callback_on_step_end: called as ``callback(pipeline, index, t, {"latents": x})`` after each step; a dict
                that it returns may replace ``latents``.

        Returns:
            The images, in the order of the prompts.
        """
        _check_output_type(output_type)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        states = self.encode_prompt(prompts)
        if guidance_scale > 1:
            states = torch.cat([self.encode_prompt([""] * len(prompts)), states])

        def predict(rows: Tensor, t: Tensor) -> Tensor:
            return self.unet(rows, t, encoder_hidden_states=states, return_dict=False)[0]

        how = (num_inference_steps, guidance_scale, generator, output_type, return_dict, callback_on_step_end)
        return self._sample(self.unet, predict, len(prompts), *how)


class PixelClassConditionalPipeline(_PixelPipeline):
    """Class to image with a diffusion transformer that works on pixels.

    Args:
        transformer: a diffusers ``DiTTransformer2DModel``; the class after its last one is the null class.
        scheduler: any diffusers scheduler with ``step``.
        pixel_block: as in `PixelTextToImagePipeline`.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ("latents",)

    def __init__(self, transformer: nn.Module, scheduler: SchedulerMixin, pixel_block: int = 1) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(pixel_block=pixel_block)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        num_inference_steps: int = 30,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample one image for each class label; the other arguments are those of `PixelTextToImagePipeline`.

        Raises:
            DQError: for a label outside the classes that the transformer knows.
        """
        _check_output_type(output_type)
        labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        null = self.transformer.config.num_embeds_ada_norm
        if wrong := [label for label in labels if not 0 <= label < null]:
            raise DQError(f"class_labels holds {wrong}, and this transformer knows the classes 0 to {null - 1}.")
        guided = guidance_scale > 1
        classes = torch.tensor([null] * len(labels) * guided + labels, device=self._execution_device)

        def predict(rows: Tensor, t: Tensor) -> Tensor:
            timesteps = t.to(rows.device).expand(len(rows))
            return self.transformer(rows, timestep=timesteps, class_labels=classes, return_dict=False)[0]

        how = (num_inference_steps, guidance_scale, generator, output_type, return_dict, callback_on_step_end)
        return self._sample(self.transformer, predict, len(labels), *how)
