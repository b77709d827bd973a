"""Train the text-conditional emoji denoiser: a small U-Net and its text encoder on Noto emoji of 32x32 pixels.

    python examples/denoisers/train_emoji.py --out emoji

The images are Google's Noto emoji (Apache-2.0) from the npm package emoji-datasource-google, one category of them,
with their Unicode names as prompts. Without ``--data`` the script takes the package through ``npm pack``; with it, from
a file that an earlier run kept. The denoiser is a diffusers `UNet2DConditionModel` that predicts v; it sees each 2x2
block of pixels as one position of 12 channels, which is exact and a quarter of the work. The text encoder is a
two-layer `CLIPTextModel` trained with it, over a vocabulary of whole words.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from dq_diffusers.pipelines import PixelTextToImagePipeline
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
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
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

PACKAGE = "emoji-datasource-google@16.0.0"
CATEGORY = "Animals & Nature"
SIZE, BLOCK, LENGTH, TEXT_WIDTH = 32, 2, 12, 64
DEFAULTS = Settings(out=Path("emoji"), steps=5000, batch_size=32, learning_rate=1e-3)


def fetch_emoji() -> tuple[np.ndarray, list[str]]:
    """Images ``[N, 32, 32, 3]`` uint8 on white and Unicode names of `CATEGORY`, from the npm package."""
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True, capture_output=True, text=True)
        with tarfile.open(Path(folder) / packed.stdout.split()[-1]) as archive:
            records = json.load(archive.extractfile("package/emoji.json"))
            chosen = [r for r in records if r["category"] == CATEGORY and r["has_img_google"]]
            images = [_read(archive, f"package/img/google/64/{r['image']}") for r in chosen]
    return np.stack(images), [r["name"].lower() for r in chosen]


def _read(archive: tarfile.TarFile, name: str) -> np.ndarray:
    picture = Image.open(archive.extractfile(name)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return np.asarray(white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))


def load_emoji(cache: Path | None) -> tuple[Tensor, list[str]]:
    """Images ``[N, 3, 32, 32]`` in [-1, 1] and prompts, from ``cache`` where it exists."""
    if cache is not None and cache.is_file():
        with np.load(cache, allow_pickle=False) as data:
            rows = data["category"] == CATEGORY
            images, names = data["images"][rows], [name.lower() for name in data["names"][rows].tolist()]
    else:
        images, names = fetch_emoji()
        if cache is not None:
            np.savez_compressed(cache, images=images, names=np.array(names), category=np.array([CATEGORY] * len(names)))
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, names


def build_tokenizer(names: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, with a first and a last token as CLIP's has."""
    special = ["<pad>", "<unk>", "<start>", "<end>"]
    words = sorted({word for name in names for word in name.replace("-", " ").split()})
    vocabulary = {word: i for i, word in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<start>", vocabulary["<start>"]), ("<end>", vocabulary["<end>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    roles = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, **roles)


def build_text_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    """Two causal layers of width 64."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_denoiser() -> UNet2DConditionModel:
    """Three resolutions, text at the two lower ones."""
    return UNet2DConditionModel(
        sample_size=SIZE // BLOCK,
        in_channels=3 * BLOCK**2,
        out_channels=3 * BLOCK**2,
        block_out_channels=(48, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    """Cosine noise schedule (arXiv 2102.09672), v-prediction, sampled with DDIM."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=True,
    )


def emoji_loss(model: nn.ModuleDict, images: Tensor, tokens: Tensor, null: Tensor, settings: Settings) -> Loss:
    """The loss of one random batch, as `training.train` wants it."""
    scheduler = build_scheduler()

    def loss_of(rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (settings.batch_size,), generator=rng)
        ids = drop_condition(tokens[rows], null, rng).to(settings.device)
        states = model["text_encoder"](ids).last_hidden_state

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return model["unet"](x, t, encoder_hidden_states=states, return_dict=False)[0]

        return diffusion_loss(denoise, images[rows].to(settings.device), scheduler, rng)

    return loss_of


def main(argv: list[str] | None = None) -> None:
    """Train, then write the pipeline (U-Net in float16) and a grid of its samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="file (.npz) to keep the images in, and to take them from")
    add_arguments(parser, DEFAULTS)
    arguments = parser.parse_args(argv)
    settings = settings_from(arguments, DEFAULTS)
    images, names = load_emoji(arguments.data)
    set_determinism(settings.seed)
    tokenizer = build_tokenizer(names)
    model = nn.ModuleDict({"unet": build_denoiser(), "text_encoder": build_text_encoder(tokenizer)})
    model = model.to(settings.device)
    padded = tokenizer([*names, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    images = nn.functional.pixel_unshuffle(images, BLOCK)
    train(model, emoji_loss(model, images, padded[:-1], padded[-1], settings), settings)
    model = model.cpu()
    # The text encoder is small and stays in float32: transformers would hand a float16 one back as float16.
    parts = (model["unet"].half(), model["text_encoder"], tokenizer, build_scheduler())
    PixelTextToImagePipeline(*parts, pixel_block=BLOCK).save_pretrained(settings.out)
    (settings.out / "prompts.txt").write_text("".join(f"{name}\n" for name in names))
    write_samples(settings.out, names[:: max(1, len(names) // 48)][:48])


def write_samples(folder: Path, prompts: list[str]) -> None:
    """Write ``samples.png``: one sample of each prompt, from the pipeline as it was saved."""
    pipeline = PixelTextToImagePipeline.from_pretrained(folder)
    images = pipeline(prompts, generator=torch.Generator().manual_seed(0)).images
    save_grid(images, folder / "samples.png", columns=8, scale=2)


if __name__ == "__main__":
    main()
