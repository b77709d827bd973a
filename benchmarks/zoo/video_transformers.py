"""Transformers of diffusers that make video, some of them with sound."""

from __future__ import annotations

import torch

from benchmarks.zoo.specimen import Inputs, Specimen, ones, r, t, whole

S = Specimen
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 12,
        "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32}  # fmt: skip
_COG = {**_HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 4, "text_embed_dim": 12, "num_layers": 1,
        "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 6}  # fmt: skip
_HUNYUAN = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 12, "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4)}  # fmt: skip
_COSMOS = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
           "mlp_ratio": 2, "text_embed_dim": 12, "adaln_lora_dim": 4, "max_size": (4, 32, 32), "patch_size": (1, 2, 2),
           "rope_scale": (2.0, 1.0, 1.0), "concat_padding_mask": False}  # fmt: skip
_LTX2 = {**_HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "audio_in_channels": 4,
         "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4,
         "audio_cross_attention_dim": 8, "num_layers": 1, "caption_channels": 16,
         "rope_double_precision": False}  # fmt: skip


def clip(text: int = 12, frames: int = 2, size: int = 8, channels: int = 4, length: int = 6) -> Inputs:
    """A video ``[B, C, T, H, W]`` and a text."""
    return {
        "hidden_states": r(2, channels, frames, size, size),
        "encoder_hidden_states": r(2, length, text),
        "timestep": t(),
    }


def _frames_first(frames: int = 2) -> Inputs:
    return clip() | {"hidden_states": r(2, frames, 4, 8, 8)}


def _helios() -> Inputs:
    return clip() | {
        "indices_hidden_states": ones(2, 2), "indices_latents_history_short": ones(2, 1),
        "indices_latents_history_mid": ones(2, 1), "indices_latents_history_long": ones(2, 4),
        "latents_history_short": r(2, 4, 1, 8, 8), "latents_history_mid": r(2, 4, 1, 8, 8),
        "latents_history_long": r(2, 4, 4, 8, 8),
    }  # fmt: skip


def _framepack() -> Inputs:
    return clip(frames=3, size=4) | {
        "pooled_projections": r(2, 8), "encoder_attention_mask": ones(2, 6), "guidance": t(value=6.0),
        "image_embeds": r(2, 6, 12), "indices_latents": torch.arange(3.0), "latents_clean": r(2, 4, 2, 4, 4),
        "indices_latents_clean": torch.arange(2.0), "latents_history_2x": r(2, 4, 2, 4, 4),
        "indices_latents_history_2x": torch.arange(2.0), "latents_history_4x": r(2, 4, 8, 4, 4),
        "indices_latents_history_4x": torch.arange(8.0),
    }  # fmt: skip


def _kandinsky5() -> Inputs:
    return {
        "hidden_states": r(2, 1, 8, 8, 4), "encoder_hidden_states": r(2, 6, 12), "timestep": t(),
        "pooled_projections": r(2, 10), "visual_rope_pos": [torch.arange(1), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(6),
    }  # fmt: skip


def _kandinsky6() -> Inputs:
    return {
        "hidden_states": r(2, 2, 8, 8, 4), "encoder_hidden_states": r(2, 6, 12), "timestep": t(),
        "pooled_projections": r(2, 10),
    }  # fmt: skip


def _ltx2() -> Inputs:
    return {
        "hidden_states": r(2, 32, 4), "audio_hidden_states": r(2, 9, 4), "encoder_hidden_states": r(2, 6, 16),
        "audio_encoder_hidden_states": r(2, 6, 16), "timestep": t(), "num_frames": 2, "height": 4, "width": 4,
        "audio_num_frames": 9, "fps": 25.0,
    }  # fmt: skip


def _minimax() -> Inputs:
    text, audio, video = torch.arange(4), torch.arange(4, 10), torch.arange(10, 18)
    tags, levels, positions = (
        torch.zeros(18, dtype=torch.int64),
        torch.zeros(18, dtype=torch.int64),
        torch.zeros(18, 3),
    )
    tags[text], tags[audio], levels[audio] = 1, 2, 1
    positions[:, 0] = torch.arange(18)
    return {
        "hidden_states": r(2, 8, 16), "audio_hidden_states": r(2, 6, 6), "encoder_hidden_states": r(2, 4, 8),
        "timestep": torch.tensor([0.7, 0.3]), "timestep_indices": levels, "token_tags": tags,
        "position_ids": positions, "video_indices": video, "audio_indices": audio, "text_indices": text,
    }  # fmt: skip


def _animate2() -> Inputs:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [r(4, 1, 4, 4)], "timestep": t(1), "encoder_hidden_states": [r(6, 12)],
        "condition_latents": [r(8, 1, 4, 4)], "encoder_hidden_states_image": r(1, 257, 1280), "seq_len": 4,
        "kv_cache": WanAnimate2KVCache(1), "kv_cache_mode": "extract", "offset_grid_sizes": torch.tensor([[1, 2, 2]]),
    }  # fmt: skip


VIDEO_TRANSFORMERS: dict[str, Specimen] = {
    "AllegroTransformer3DModel": S(
        {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "cross_attention_dim": 16, "sample_width": 8,
         "sample_height": 8, "sample_frames": 8, "caption_channels": 12},
        lambda: clip() | {"timestep": whole()},
    ),
    "AnyFlowTransformer3DModel": S(
        {**_WAN, "gate_value": 0.25, "deltatime_type": "r"},
        lambda: _frames_first() | {"timestep": torch.full((2, 2), 500.0), "r_timestep": torch.full((2, 2), 250.0)},
    ),
    "AnyFlowFARTransformer3DModel": S(
        {**_WAN, "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3, "gate_value": 0.25, "deltatime_type": "r"},
        lambda: _frames_first(4) | {"timestep": torch.full((2, 4), 500.0), "r_timestep": torch.full((2, 4), 250.0),
                                    "chunk_partition": [2, 2]},
    ),
    "ChronoEditTransformer3DModel": S({**_WAN, "rope_temporal_skip_len": 8}, clip),
    "CogVideoXTransformer3DModel": S(_COG, _frames_first),
    "ConsisIDTransformer3DModel": S(
        {**_COG, "sample_frames": 8, "cross_attn_interval": 1, "is_kps": False, "is_train_face": True,
         "cross_attn_dim_head": 4, "cross_attn_num_heads": 2, "LFE_id_dim": 4, "LFE_vit_dim": 4, "LFE_depth": 5,
         "LFE_dim_head": 8, "LFE_num_heads": 2, "LFE_num_id_token": 1, "LFE_num_querie": 1, "LFE_output_dim": 10,
         "LFE_ff_mult": 1, "LFE_num_scale": 1},
        lambda: _frames_first(1) | {"id_vit_hidden": [r(2, 2, 4)], "id_cond": r(2, 4)},
    ),
    "CosmosTransformer3DModel": S(
        _COSMOS, lambda: clip() | {"fps": 16, "timestep": t(value=0.5)}
    ),
    "EasyAnimateTransformer3DModel": S(
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "mmdit_layers": 2, "num_layers": 2,
         "out_channels": 4, "patch_size": 2, "sample_height": 60, "sample_width": 90, "text_embed_dim": 12,
         "time_embed_dim": 8},
        clip,
    ),
    "HeliosTransformer3DModel": S(
        {**{k: v for k, v in _WAN.items() if k != "rope_max_seq_len"}, "rope_dim": (4, 4, 4),
         "has_multi_term_memory_patch": True, "guidance_cross_attn": True, "zero_history_timestep": True},
        _helios,
    ),
    "HunyuanVideo15Transformer3DModel": S(
        {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0,
         "text_embed_dim": 12, "text_embed_2_dim": 8, "image_embed_dim": 12, "rope_axes_dim": (2, 2, 4),
         "target_size": 16, "task_type": "t2v", "patch_size": 1, "patch_size_t": 1},
        lambda: clip(size=4) | {"encoder_attention_mask": ones(2, 6), "encoder_hidden_states_2": r(2, 4, 8),
                                "encoder_attention_mask_2": ones(2, 4), "image_embeds": torch.zeros(2, 3, 12)},
    ),
    "HunyuanVideoFramepackTransformer3DModel": S(
        {**_HUNYUAN, "patch_size": 2, "guidance_embeds": True, "has_image_proj": True, "image_proj_dim": 12,
         "has_clean_x_embedder": True},
        _framepack,
    ),
    "HunyuanVideoTransformer3DModel": S(
        {**_HUNYUAN, "guidance_embeds": True},
        lambda: clip() | {"encoder_attention_mask": ones(2, 6), "pooled_projections": r(2, 8),
                          "guidance": t(value=6.0)},
    ),
    "Kandinsky5Transformer3DModel": S(
        {"in_text_dim": 12, "in_text_dim2": 10, "time_dim": 16, "model_dim": 32, "ff_dim": 48, "num_text_blocks": 1,
         "num_visual_blocks": 1, "axes_dims": (4, 6, 6)},
        _kandinsky5,
    ),
    "Kandinsky6SRTransformer3DModel": S(
        {"in_visual_dim": 8, "out_visual_dim": 8, "time_dim": 16, "model_dim": 32, "ff_dim": 48,
         "num_visual_blocks": 1, "axes_dims": (4, 6, 6), "nabla_window": (1, 1, 1), "tile_sizes": ((8, 8),)},
        lambda: {"hidden_states": r(2, 1, 8, 8, 17), "timestep": t()},
    ),
    "Kandinsky6Transformer3DModel": S(
        {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 12, "in_text_dim2": 10, "time_dim": 16,
         "model_dim": 32, "ff_dim": 48, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 6, 6),
         "visual_cond": False},
        _kandinsky6,
    ),
    "LTX2VideoTransformer3DModel": S(_LTX2, _ltx2),
    "LTXVideoTransformer3DModel": S(
        {**_HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "num_layers": 2,
         "caption_channels": 12},
        lambda: {"hidden_states": r(2, 32, 4), "encoder_hidden_states": r(2, 6, 12), "timestep": t(),
                 "encoder_attention_mask": ones(2, 6), "num_frames": 2, "height": 4, "width": 4},
    ),
    "LatteTransformer3DModel": S(
        {**_HEADS, "sample_size": 8, "num_layers": 1, "patch_size": 2, "caption_channels": 12, "in_channels": 4,
         "cross_attention_dim": 16, "out_channels": 8, "attention_bias": True, "num_embeds_ada_norm": 1000,
         "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "video_length": 2},
        clip,
    ),
    "MiniMaxH3Transformer3DModel": S(
        {"num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_layers": 2,
         "num_refiner_layers": 2, "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 6, "text_dim": 8,
         "freq_dim": 8, "time_embed_hidden_dim": 24, "time_embed_dim": 16, "rope_freq_dim": 2},
        _minimax,
    ),
    "MochiTransformer3DModel": S(
        {**_HEADS, "num_layers": 2, "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16,
         "time_embed_dim": 8, "max_sequence_length": 8},
        lambda: clip(16, length=8) | {"encoder_attention_mask": ones(2, 8, dtype=torch.bool)},
    ),
    "MotifVideoTransformer3DModel": S(
        {"in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
         "num_single_layers": 1, "num_decoder_layers": 0, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 12,
         "image_embed_dim": 4, "rope_axes_dim": (4, 4, 4)},
        lambda: clip(channels=9, size=4),
    ),
    "SanaVideoTransformer3DModel": S(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
         "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
         "caption_channels": 12, "sample_size": 8, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32},
        clip,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": S(
        _LTX2,
        lambda: {"hidden_states": r(2, 32, 4), "encoder_hidden_states": r(2, 6, 16), "timestep": t(),
                 "video_rotary_emb": (r(2, 32, 16), r(2, 32, 16))},
    ),
    "SanaWMTransformer3DModel": S(
        {"in_channels": 4, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "linear_head_dim": 16,
         "softmax_every_n": 2, "chunk_plucker_post_attn_blocks": 2, "caption_channels": 12, "image_size": 64},
        lambda: clip(length=6) | {"hidden_states": r(2, 4, 2, 4, 4), "encoder_hidden_states": r(2, 1, 6, 12),
                                  "mask": ones(2, 1, 1, 6), "timestep": torch.full((2, 1, 2), 500.0)},
    ),
    "SkyReelsV2Transformer3DModel": S(_WAN, lambda: clip() | {"timestep": whole()}),
    "WanAnimate2Transformer3DModel": S(
        {"text_len": 8, "in_dim": 12, "dim": 48, "ffn_dim": 64, "freq_dim": 16, "text_dim": 12, "out_dim": 4,
         "num_heads": 2, "num_layers": 1},
        _animate2,
        outside={"record": "it takes a cache that calls fill and read: what a call gives depends on earlier ones"},
    ),
    "WanAnimateTransformer3DModel": S(
        {**_WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 12,
         "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_encoder_size": 16,
         "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16,
         "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2},
        lambda: clip(channels=12, frames=3) | {"encoder_hidden_states_image": r(2, 5, 12),
            "pose_hidden_states": r(2, 4, 2, 8, 8), "face_pixel_values": r(2, 3, 5, 16, 16)},
    ),
    "WanTransformer3DModel": S(_WAN, clip),
    "WanVACETransformer3DModel": S(
        {**_WAN, "vace_layers": [0, 1], "vace_in_channels": 8},
        lambda: clip() | {"control_hidden_states": r(2, 8, 2, 8, 8)},
    ),
    "TransformerTemporalModel": S(
        {**_HEADS, "in_channels": 16, "num_layers": 2, "norm_num_groups": 4},
        lambda: {"hidden_states": r(4, 16, 8, 8), "timestep": whole(),
                 "num_frames": 2},
    ),
}  # fmt: skip
"""By class name."""
