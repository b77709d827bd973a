"""Pipelines with random weights, as small as they get, for tests that sample."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from dq_diffusers.pipelines import PixelClassConditionalPipeline, PixelTextToImagePipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast


def class_pipeline() -> PixelClassConditionalPipeline:
    """Three classes; images of 4 x 4 pixels and one channel."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=1, out_channels=1, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=3, norm_num_groups=1,
    )  # fmt: skip
    return quiet(PixelClassConditionalPipeline(transformer.eval(), DDIMScheduler()))


def text_pipeline(block: int = 1) -> PixelTextToImagePipeline:
    """A vocabulary of two words; the U-Net sees 4 x 4 positions of ``block`` x ``block`` pixels each."""
    unet = text_unet(3 * block**2)
    return quiet(PixelTextToImagePipeline(unet, text_encoder(), tokenizer(), DDIMScheduler(), block))


def text_unet(channels: int, inputs: int | None = None) -> UNet2DConditionModel:
    """A U-Net for texts of `text_encoder`; ``sample [B, inputs, 4, 4]``, by default as many inputs as outputs."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=4, in_channels=inputs or channels, out_channels=channels, block_out_channels=(8, 8),
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """Two words, ``red`` and ``fox``."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "fox": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]", model_max_length=4)


def text_encoder() -> CLIPTextModel:
    """Eight features for each of four tokens."""
    torch.manual_seed(1)
    text = CLIPTextConfig(
        vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return CLIPTextModel(text).eval()


def latent_parts(inputs: int = 4) -> dict[str, Any]:
    """Components of Stable Diffusion's pipelines; images of 8 x 8 pixels."""
    torch.manual_seed(2)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), norm_num_groups=4, latent_channels=4, sample_size=8,
    )  # fmt: skip
    named = {"vae": vae.eval(), "text_encoder": text_encoder(), "tokenizer": tokenizer()}
    unet = text_unet(4, inputs)
    return named | {
        "unet": unet,
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        "safety_checker": None,
        "feature_extractor": None,
    }


def wan_transformer(inputs: int = 16) -> WanTransformer3DModel:
    """One block of Wan's; sixteen channels of latents."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=inputs, out_channels=16,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=1, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    ).eval()  # fmt: skip


def wan_vae() -> AutoencoderKLWan:
    """Videos of 16 x 16 pixels are latents of 2 x 2, nine frames are three."""
    torch.manual_seed(2)
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def quiet(pipe: DiffusionPipeline) -> Any:
    """The pipeline, without progress bars."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
