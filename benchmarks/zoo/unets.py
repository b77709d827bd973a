"""U-Nets of diffusers."""

from __future__ import annotations

from benchmarks.zoo.specimen import Specimen, ones, r, t, whole

S = Specimen
_UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
         "cross_attention_dim": 12, "attention_head_dim": 4}  # fmt: skip


def _blocks(of: str) -> dict[str, tuple[str, str]]:
    return {"down_block_types": (f"CrossAttnDownBlock{of}", f"DownBlock{of}"),
            "up_block_types": (f"UpBlock{of}", f"CrossAttnUpBlock{of}")}  # fmt: skip


UNETS: dict[str, Specimen] = {
    "DreamLiteUNetModel": S(
        {**_UNET, "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
         "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D")},
        lambda: {"sample": r(2, 4, 8, 8), "timestep": whole(), "encoder_hidden_states": r(2, 6, 12)},
    ),
    "I2VGenXLUNet": S(
        {**_UNET, **_blocks("3D")},
        lambda: {"sample": r(2, 4, 2, 8, 8), "timestep": whole(), "fps": whole(value=8),
                 "image_latents": r(2, 4, 2, 8, 8), "image_embeddings": r(2, 12), "encoder_hidden_states": r(2, 6, 12)},
    ),
    "Kandinsky3UNet": S(
        {"time_embedding_dim": 16, "groups": 4, "attention_head_dim": 8, "layers_per_block": 2,
         "block_out_channels": (16, 16, 16, 16), "cross_attention_dim": 12, "encoder_hid_dim": 12},
        lambda: {"sample": r(2, 4, 8, 8), "timestep": whole(), "encoder_hidden_states": r(2, 6, 12),
                 "encoder_attention_mask": ones(2, 6)},
    ),
    "StableCascadeUNet": S(
        {"in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "conditioning_dim": 16,
         "block_out_channels": (16, 16), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1),
         "up_num_layers_per_block": (1, 1), "clip_text_in_channels": 12, "clip_text_pooled_in_channels": 10,
         "clip_image_in_channels": 6, "switch_level": (False,)},
        lambda: {"sample": r(2, 4, 8, 8), "timestep_ratio": t(value=0.5), "clip_text_pooled": r(2, 1, 10),
                 "clip_text": r(2, 6, 12), "clip_img": r(2, 1, 6)},
    ),
    "UNet1DModel": S(
        {"block_out_channels": (8, 8, 16, 16), "in_channels": 14, "out_channels": 14,
         "time_embedding_type": "positional", "use_timestep_embedding": True, "flip_sin_to_cos": False,
         "freq_shift": 1.0, "out_block_type": "OutConv1DBlock", "mid_block_type": "MidResTemporalBlock1D",
         "down_block_types": ("DownResnetBlock1D",) * 4, "up_block_types": ("UpResnetBlock1D",) * 3,
         "act_fn": "swish"},
        lambda: {"sample": r(2, 14, 16), "timestep": whole()},
    ),
    "UNet2DConditionModel": S(
        {**_UNET, **_blocks("2D")},
        lambda: {"sample": r(2, 4, 8, 8), "timestep": whole(), "encoder_hidden_states": r(2, 6, 12)},
    ),
    "UNet2DModel": S(
        {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
         "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        lambda: {"sample": r(2, 3, 8, 8), "timestep": whole()},
    ),
    "UNet3DConditionModel": S(
        {**_UNET, **_blocks("3D")},
        lambda: {"sample": r(2, 4, 2, 8, 8), "timestep": whole(), "encoder_hidden_states": r(2, 6, 12)},
    ),
    "UNetMotionModel": S(
        {**{k: v for k, v in _UNET.items() if k != "attention_head_dim"}, **_blocks("Motion"),
         "num_attention_heads": 2, "motion_num_attention_heads": 2},
        lambda: {"sample": r(2, 4, 2, 8, 8), "timestep": whole(), "encoder_hidden_states": r(4, 6, 12)},
    ),
    "UNetSpatioTemporalConditionModel": S(
        {"sample_size": 8, "block_out_channels": (32, 64), "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
         "cross_attention_dim": 12, "num_attention_heads": 4, "addition_time_embed_dim": 8,
         "projection_class_embeddings_input_dim": 24,
         "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
         "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")},
        lambda: {"sample": r(2, 2, 4, 8, 8), "timestep": whole(), "encoder_hidden_states": r(2, 1, 12),
                 "added_time_ids": r(2, 3)},
    ),
}  # fmt: skip
"""By class name."""
