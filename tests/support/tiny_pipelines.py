"""Pipelines in pixel space with random weights, as small as they get, for tests that sample."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel, UNet2DConditionModel
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
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "fox": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]", model_max_length=4
    )
    text = CLIPTextConfig(
        vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=3 * block**2, out_channels=3 * block**2, block_out_channels=(8, 8),
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return quiet(PixelTextToImagePipeline(unet.eval(), CLIPTextModel(text).eval(), tokenizer, DDIMScheduler(), block))


def quiet(pipe: DiffusionPipeline) -> Any:
    """The pipeline, without progress bars."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
