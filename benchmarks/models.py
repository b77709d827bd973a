"""Denoisers to measure: a U-Net and a diffusion transformer of laptop size, built from config, without downloads, and
the two trained ones that come with the package.

Speed does not depend on the values of the weights, but error does: zero-initialised layers (the last convolution, the
gates of AdaLN) would hide the error of everything before them, so they get small random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """A denoiser to measure.

    Attributes:
        denoiser: the module, in eval mode, without gradients.
        inputs: ``inputs(t, seed)`` gives the keyword arguments of one call with every sample at timestep ``t``.
    """

    denoiser: nn.Module
    inputs: Callable[[float, int], Inputs]


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _ready(denoiser: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return denoiser.eval().requires_grad_(False)


def unet(batch: int = 2) -> Model:
    """Text-conditional U-Net, 50 M parameters, 32 x 32 latents."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    denoiser = UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(128, 256, 512),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=256,
        attention_head_dim=(2, 4, 8),
    )

    def inputs(t: float, seed: int = 0) -> Inputs:
        return {
            "sample": _random((batch, 4, 32, 32), seed),
            "timestep": torch.full((), t),
            "encoder_hidden_states": _random((batch, 77, 256), seed + 1),
        }

    return Model(_ready(denoiser), inputs)


def pixel_unet() -> nn.Module:
    """Unconditional U-Net in pixel space as of a DDPM, 63 M parameters, 64 x 64."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return _ready(
        UNet2DModel(
            sample_size=64,
            layers_per_block=2,
            block_out_channels=(128, 128, 256, 512),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )
    )


def dit(batch: int = 2) -> Model:
    """Class-conditional diffusion transformer, 40 M parameters, 256 tokens."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    denoiser = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=12,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
        activation_fn="gelu-approximate",
    )

    def inputs(t: float, seed: int = 0) -> Inputs:
        return {
            "hidden_states": _random((batch, 4, 32, 32), seed),
            "timestep": torch.full((batch,), int(t)),
            "class_labels": torch.arange(batch),
        }

    return Model(_ready(denoiser), inputs)


def bundled_model(name: str, batch: int = 8) -> Model:
    """A trained denoiser of the package; inputs are noise, with random text embeddings or classes in turn."""
    from dq_diffusers.recording import denoiser_of, load_pipeline

    from dq_plugins.bundled_denoisers import bundled

    _, denoiser = denoiser_of(load_pipeline(str(bundled(name))))
    config: Any = denoiser.config
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)

    def inputs(t: float, seed: int = 0) -> Inputs:
        sample, timestep = _random(shape, seed), torch.full((batch,), int(t))
        if hasattr(config, "cross_attention_dim"):
            words = _random((batch, 16, config.cross_attention_dim), seed + 1)
            return {"sample": sample, "timestep": timestep, "encoder_hidden_states": words}
        return {"hidden_states": sample, "timestep": timestep, "class_labels": torch.arange(batch) % 10}

    return Model(denoiser.eval().requires_grad_(False), inputs)


MODELS: dict[str, Callable[[], Model]] = {
    "unet": unet,
    "dit": dit,
    **{name: partial(bundled_model, name) for name in ("emoji", "digits")},
}
