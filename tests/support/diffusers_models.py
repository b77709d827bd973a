"""Tiny diffusers denoisers with random weights, and their plans, for tests that save and load."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from dq_diffusers.pipelines import PixelClassConditionalPipeline
from torch import Tensor, nn

TIMESTEPS = (100.0, 500.0, 900.0)


def unet(seed: int = 0) -> UNet2DModel:
    """Two resolutions, 8 and 16 channels, attention in the lower one; ``sample [B, 3, 8, 8]``."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def dit(seed: int = 0) -> DiTTransformer2DModel:
    """Two blocks of width 16, four classes; ``sample [B, 3, 8, 8]``."""
    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=4,
        norm_num_groups=1,
    ).eval()


@torch.no_grad()
def outputs(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs at every timestep of the plan, for the same sample."""
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    extra = {"class_labels": torch.tensor([0, 3])} if isinstance(model, DiTTransformer2DModel) else {}
    return [model(x, timestep=torch.tensor([t, t]), **extra).sample for t in TIMESTEPS]


def same(a: nn.Module, b: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    """Whether two denoisers compute the same bits."""
    return all(torch.equal(x, y) for x, y in zip(outputs(a, dtype), outputs(b, dtype), strict=True))


def class_pipeline(denoiser: nn.Module | None = None) -> PixelClassConditionalPipeline:
    """A pipeline around `dit`, or around a quantized one."""
    return PixelClassConditionalPipeline(denoiser or dit(), DDIMScheduler())
