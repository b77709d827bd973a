"""Train the class-conditional digit denoiser: a small diffusion transformer on the digits that ship with scikit-learn.

    python examples/denoisers/train_digits.py --out digits

The 1,797 handwritten digits of 8x8 pixels (UCI, CC BY 4.0) are enlarged to 16x16. The denoiser is a diffusers
`DiTTransformer2DModel` (arXiv 2212.09748) in pixel space that predicts the noise, trained with the class dropped in a
tenth of the images for classifier-free guidance.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from dq_diffusers.pipelines import PixelClassConditionalPipeline
from torch import Tensor
from training import (
    Loss,
    Settings,
    add_arguments,
    diffusion_loss,
    drop_condition,
    save_grid,
    set_determinism,
    settings_from,
    train,
)

CLASSES = 10
DEFAULTS = Settings(out=Path("digits"), steps=2400, batch_size=64, learning_rate=1e-3)


def load_digits(size: int = 16) -> tuple[Tensor, Tensor]:
    """Images ``[1797, 1, size, size]`` in [-1, 1], ink bright, and classes ``[1797]``."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    images = torch.nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
    return images, torch.from_numpy(data.target).long()


def build_denoiser() -> DiTTransformer2DModel:
    """About 1.4 M parameters: 4 blocks of width 128 on 64 patches of 2x2 pixels; class 10 is the null class."""
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        norm_num_groups=1,
        dropout=0.0,
    )


def build_scheduler() -> DDIMScheduler:
    """The linear noise schedule of DDPM, sampled with DDIM."""
    return DDIMScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing", clip_sample=True)


def digit_loss(denoiser: DiTTransformer2DModel, images: Tensor, classes: Tensor, settings: Settings) -> Loss:
    """The loss of one random batch, as `training.train` wants it."""
    scheduler, null = build_scheduler(), torch.tensor(CLASSES)

    def loss_of(rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (settings.batch_size,), generator=rng)
        labels = drop_condition(classes[rows], null, rng).to(settings.device)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return denoiser(x, timestep=t, class_labels=labels).sample

        return diffusion_loss(denoise, images[rows].to(settings.device), scheduler, rng)

    return loss_of


def main(argv: list[str] | None = None) -> None:
    """Train, then write the pipeline (weights in float16) and a grid of its samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, DEFAULTS)
    settings = settings_from(parser.parse_args(argv), DEFAULTS)
    set_determinism(settings.seed)
    denoiser = build_denoiser()
    # The label embedding's own dropout would draw from the global generator; ours is in the checkpoint.
    for module in denoiser.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    denoiser = denoiser.to(settings.device)
    train(denoiser, digit_loss(denoiser, *load_digits(), settings), settings)
    PixelClassConditionalPipeline(denoiser.cpu().half(), build_scheduler()).save_pretrained(settings.out)
    write_samples(settings.out)


def write_samples(folder: Path, rows: int = 6) -> None:
    """Write ``samples.png``: ``rows`` samples of each class, from the pipeline as it was saved."""
    pipeline = PixelClassConditionalPipeline.from_pretrained(folder)
    labels = list(range(CLASSES)) * rows
    images = pipeline(labels, generator=torch.Generator().manual_seed(0)).images
    save_grid(images, folder / "samples.png", columns=CLASSES, scale=3)


if __name__ == "__main__":
    main()
