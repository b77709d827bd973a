"""Transformers of diffusers that make images and sound."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.zoo.specimen import Inputs, Specimen, grid, indices, ones, r, t, whole

S = Specimen
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_ONE_EACH = {"num_layers": 1, "num_single_layers": 1}
_FLUX = {**_ONE_EACH, "in_channels": 4, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12}
_SIZES = {"original_size": r(2, 2), "target_size": r(2, 2), "crop_coords": r(2, 2)}


def tokens(text: int = 12, count: int = 16, channels: int = 4, axes: int = 3) -> Inputs:
    """Image and text as sequences with positions."""
    return {
        "hidden_states": r(2, count, channels),
        "encoder_hidden_states": r(2, 6, text),
        "timestep": t(value=0.5),
        "img_ids": grid(count, axes),
        "txt_ids": torch.zeros(6, axes),
    }


def latents(text: int = 12, size: int = 8, channels: int = 4, length: int = 6) -> Inputs:
    """An image and a text."""
    return {
        "hidden_states": r(2, channels, size, size),
        "encoder_hidden_states": r(2, length, text),
        "timestep": t(),
    }


def _ideogram() -> Inputs:
    kinds = torch.tensor([3, 3, 2, 2, 2, 2]).expand(2, 6)
    return {
        "hidden_states": r(2, 6, 4), "encoder_hidden_states": r(2, 6, 12), "timestep": t(value=0.5),
        "position_ids": torch.arange(6)[None, :, None].expand(2, 6, 3), "segment_ids": ones(2, 6, dtype=torch.int64),
        "indicator": kinds,
    }  # fmt: skip


def _omnigen() -> Inputs:
    length = 6 + 1 + 16
    return {
        "hidden_states": r(2, 4, 8, 8), "timestep": t(value=0.5), "input_ids": indices(2, 6),
        "input_img_latents": [r(1, 4, 4, 4)], "input_image_sizes": {0: [[0, 4]]},
        "attention_mask": ones(2, length + 16, length + 16)[:, :length, :length],
        "position_ids": torch.arange(length).expand(2, length),
    }  # fmt: skip


def _qwen21() -> Inputs:
    return {
        "hidden_states": r(2, 16, 4), "encoder_hidden_states": r(2, 6, 12), "timestep": t(value=0.5),
        "img_shapes": [[(1, 4, 4)]] * 2, "encoder_hidden_states_mask": ones(2, 6, dtype=torch.bool),
        "img_mask": (torch.arange(10) >= 6).expand(2, 10),
    }  # fmt: skip


_QWEN = {**_HEADS, "in_channels": 16, "out_channels": 4, "attention_head_dim": 16, "joint_attention_dim": 12,
         "axes_dims_rope": (8, 4, 4), "num_layers": 1}  # fmt: skip
_STABLE_AUDIO_3 = {"io_channels": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "cond_token_dim": 16,
    "global_cond_dim": 12, "local_add_cond_dim": 5, "timestep_features_dim": 16, "ff_mult": 2,
    "num_memory_tokens": 3}  # fmt: skip


def _with_experts(model: nn.Module) -> nn.Module:
    """The experts of NucleusMoE are made without values."""
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            nn.init.normal_(parameter, std=0.1)
    return model


IMAGE_TRANSFORMERS: dict[str, Specimen] = {
    "AceStepTransformer1DModel": S(
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "in_channels": 24, "audio_acoustic_hidden_dim": 8,
         "sliding_window": 16},
        lambda: {"hidden_states": r(2, 8, 8), "timestep": t(value=0.5), "timestep_r": t(value=0.2),
                 "encoder_hidden_states": r(2, 10, 32), "context_latents": r(2, 8, 16)},
    ),
    "AuraFlowTransformer2DModel": S(
        {**_HEADS, "sample_size": 8, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
         "caption_projection_dim": 16, "joint_attention_dim": 12, "out_channels": 4, "pos_embed_max_size": 16},
        lambda: latents() | {"timestep": t(value=0.5)},
    ),
    "BriaFibo2Transformer2DModel": S(
        {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 12,
         "injection_layer_ids": (0, 1), "perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8,
         "gist_step": 2, "gist_min_text_len": 4, "gist_max_text_len": 16, "axes_dims": (4, 6, 6),
         "axes_lens": (64, 32, 32)},
        lambda: latents() | {"timestep": t(value=0.5), "encoder_hidden_states": r(2, 3, 6, 12),
                             "encoder_attention_mask": ones(2, 6, dtype=torch.bool)},
    ),
    "BriaFiboTransformer2DModel": S(
        {**_ONE_EACH, **_HEADS, "in_channels": 4, "joint_attention_dim": 24, "text_encoder_dim": 12,
         "pooled_projection_dim": None, "axes_dims_rope": [0, 4, 4]},
        lambda: tokens(24) | {"text_encoder_layers": [r(2, 6, 12), r(2, 6, 12)]},
    ),
    "BriaTransformer2DModel": S(
        {**_FLUX, **_HEADS, "pooled_projection_dim": None, "axes_dims_rope": [0, 4, 4]}, tokens
    ),
    "ChromaTransformer2DModel": S(
        {**_FLUX, "axes_dims_rope": (4, 4, 8), "approximator_num_channels": 8, "approximator_hidden_dim": 8,
         "approximator_layers": 1},
        tokens,
    ),
    "CogView3PlusTransformer2DModel": S(
        {**_HEADS, "in_channels": 4, "num_layers": 2, "out_channels": 4, "text_embed_dim": 12, "time_embed_dim": 8,
         "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8},
        lambda: latents() | _SIZES,
    ),
    "CogView4Transformer2DModel": S(
        {**_HEADS, "in_channels": 4, "num_layers": 2, "out_channels": 4, "text_embed_dim": 12, "time_embed_dim": 8,
         "condition_dim": 4},
        lambda: latents() | _SIZES,
    ),
    "DiTTransformer2DModel": S(
        {**_HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10,
         "norm_num_groups": 4},
        lambda: {"hidden_states": r(2, 4, 8, 8), "timestep": whole(), "class_labels": indices(2)},
    ),
    "DreamLiteTransformer2DModel": S(
        {**_HEADS, "in_channels": 16, "num_layers": 2, "cross_attention_dim": 12, "norm_num_groups": 4},
        lambda: latents(channels=16),
    ),
    "DualTransformer2DModel": S(
        {**_HEADS, "in_channels": 16, "num_layers": 1, "cross_attention_dim": 12, "norm_num_groups": 4},
        lambda: latents(channels=16, length=334),
    ),
    "ErnieImageTransformer2DModel": S(
        {"hidden_size": 16, "num_attention_heads": 1, "num_layers": 2, "ffn_hidden_size": 32, "in_channels": 4,
         "out_channels": 4, "text_in_dim": 12, "rope_axes_dim": (8, 4, 4)},
        lambda: {"hidden_states": r(2, 4, 4, 4), "timestep": t(), "text_bth": r(2, 6, 12),
                 "text_lens": torch.tensor([6, 5])},
    ),
    "Flux2Transformer2DModel": S({**_FLUX, "axes_dims_rope": (4, 4, 4, 4)},
                                 lambda: tokens(axes=4) | {"guidance": t(value=4.0)}),
    "Flux3Transformer2DModel": S(
        {**_FLUX, "cond_in_channels": 4, "axes_dims_rope": (4, 4, 4, 4)},
        lambda: tokens(axes=4),
    ),
    "FluxTransformer2DModel": S(
        {**_FLUX, "pooled_projection_dim": 10, "guidance_embeds": True, "axes_dims_rope": (4, 4, 8)},
        lambda: tokens() | {"pooled_projections": r(2, 10), "guidance": t(value=4.0)},
    ),
    "GlmImageTransformer2DModel": S(
        {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "text_embed_dim": 12, "time_embed_dim": 16,
         "condition_dim": 8, "prior_vq_quantizer_codebook_size": 64},
        lambda: latents() | {"prior_token_id": indices(2, 16, below=64),
                             "prior_token_drop": torch.zeros(2, 16, dtype=torch.bool),
                             "target_size": r(2, 2), "crop_coords": r(2, 2)},
    ),
    "HiDreamImageTransformer2DModel": S(
        {**_ONE_EACH, **_HEADS, "patch_size": 2, "in_channels": 4, "out_channels": 4, "caption_channels": [8, 4],
         "text_emb_dim": 8,
         "num_routed_experts": 2, "num_activated_experts": 2, "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8),
         "llama_layers": (0, 1), "force_inference_output": True},
        lambda: {"hidden_states": r(2, 4, 8, 8), "timesteps": whole(), "encoder_hidden_states_t5": r(2, 6, 8),
                 "encoder_hidden_states_llama3": r(2, 2, 6, 4), "pooled_embeds": r(2, 8)},
    ),
    "HunyuanDiT2DModel": S(
        {**_HEADS, "sample_size": 8, "num_layers": 2, "patch_size": 2, "cross_attention_dim": 12,
         "cross_attention_dim_t5": 16, "pooled_projection_dim": 16, "hidden_size": 16, "in_channels": 4, "text_len": 5,
         "text_len_t5": 6, "activation_fn": "gelu-approximate"},
        lambda: latents(length=5) | {"text_embedding_mask": ones(2, 5), "encoder_hidden_states_t5": r(2, 6, 16),
            "text_embedding_mask_t5": ones(2, 6), "image_meta_size": r(2, 6), "style": indices(2, below=1),
            "image_rotary_emb": (r(16, 8), r(16, 8))},
    ),
    "HunyuanImageTransformer2DModel": S(
        {**_ONE_EACH, **_HEADS, "in_channels": 4, "out_channels": 4, "num_refiner_layers": 1, "text_embed_dim": 12,
         "rope_axes_dim": (4, 4), "use_meanflow": True},
        lambda: latents() | {"encoder_attention_mask": ones(2, 6), "timestep_r": t(value=300.0)},
    ),
    "Ideogram4Transformer2DModel": S(
        {**_HEADS, "in_channels": 4, "num_layers": 2, "intermediate_size": 32, "adaln_dim": 16, "llm_features_dim": 12,
         "rope_theta": 10000, "mrope_section": (2, 1, 1)},
        _ideogram,
    ),
    "JoyImageEditTransformer3DModel": S(
        {"patch_size": [1, 2, 2], "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 12,
         "num_layers": 2, "rope_dim_list": [4, 6, 6], "theta": 256},
        lambda: latents() | {"hidden_states": r(2, 4, 1, 4, 4)},
    ),
    "JoyImageEditPlusTransformer3DModel": S(
        {"patch_size": [1, 2, 2], "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 12,
         "num_layers": 2, "rope_dim_list": [4, 6, 6], "theta": 256},
        lambda: latents() | {"hidden_states": r(2, 2, 4, 1, 2, 2), "shape_list": [[(1, 1, 1), (1, 1, 1)]] * 2},
    ),
    "Krea2Transformer2DModel": S(
        {**_HEADS, "in_channels": 4, "num_layers": 2, "num_key_value_heads": 1, "intermediate_size": 32,
         "timestep_embed_dim": 8, "text_hidden_dim": 12, "num_text_layers": 2, "text_num_attention_heads": 2,
         "text_num_key_value_heads": 1, "text_intermediate_size": 16, "num_layerwise_text_blocks": 1,
         "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 2, 2)},
        lambda: {"hidden_states": r(2, 4, 4), "encoder_hidden_states": r(2, 6, 2, 12), "timestep": t(value=0.5),
                 "position_ids": grid(10), "encoder_attention_mask": ones(2, 6, dtype=torch.bool)},
    ),
    "LongCatAudioDiTTransformer": S(
        {"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 12, "latent_dim": 8},
        lambda: {"hidden_states": r(2, 16, 8), "encoder_hidden_states": r(2, 6, 12), "timestep": t(value=0.5),
                 "encoder_attention_mask": ones(2, 6, dtype=torch.bool),
                 "attention_mask": ones(2, 16, dtype=torch.bool)},
    ),
    "LongCatImageTransformer2DModel": S(
        {**_FLUX, "pooled_projection_dim": 12, "axes_dims_rope": [4, 4, 8]}, tokens
    ),
    "Lumina2Transformer2DModel": S(
        {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1,
         "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2),
         "axes_lens": (32, 32, 32), "cap_feat_dim": 12},
        lambda: latents() | {"timestep": t(value=0.5), "encoder_attention_mask": ones(2, 6, dtype=torch.bool)},
    ),
    "LuminaNextDiT2DModel": S(
        {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_attention_heads": 3,
         "num_kv_heads": 1, "multiple_of": 16, "learn_sigma": False, "cross_attention_dim": 12},
        lambda: latents() | {"timestep": t(value=0.5), "encoder_mask": ones(2, 6), "image_rotary_emb": r(384, 384, 4),
                             "cross_attention_kwargs": {}},
    ),
    "MiniMaxMusic3Transformer1DModel": S(
        {**_HEADS, "in_channels": 8, "condition_dim": 16, "num_layers": 2, "ff_inner_dim": 32, "rotary_dim": 4,
         "fourier_embedding_dim": 8},
        lambda: {"hidden_states": r(2, 8, 24), "timestep": t(value=0.5), "encoder_hidden_states": r(2, 24, 16)},
    ),
    "NucleusMoEImageTransformer2DModel": S(
        {**_QWEN, "num_layers": 4, "moe_enabled": True, "num_experts": 4, "moe_intermediate_dim": 16,
         "mlp_ratio": 8.0, "capacity_factors": [2.0] * 4, "dense_moe_strategy": "leave_first_three_blocks_dense"},
        lambda: {"hidden_states": r(2, 16, 16), "encoder_hidden_states": r(2, 6, 12), "timestep": t(value=0.5),
                 "encoder_hidden_states_mask": ones(2, 6, dtype=torch.int64), "img_shapes": [(1, 4, 4)] * 2},
        complete=_with_experts,
    ),
    "OmniGenTransformer2DModel": S(
        {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 32,
         "num_layers": 2, "pad_token_id": 0, "vocab_size": 32, "in_channels": 4, "time_step_dim": 4,
         "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]}},
        _omnigen,
    ),
    "OvisImageTransformer2DModel": S({**_FLUX, "out_channels": 4, "axes_dims_rope": (4, 4, 8)}, tokens),
    "PRXTransformer2DModel": S(
        {"in_channels": 4, "context_in_dim": 12, "hidden_size": 32, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]},
        lambda: latents() | {"timestep": t(value=0.5)},
    ),
    "PixArtTransformer2DModel": S(
        {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "sample_size": 8,
         "caption_channels": 12, "cross_attention_dim": 24},
        lambda: latents() | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "PriorTransformer": S(
        {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "embedding_dim": 8, "num_embeddings": 7,
         "additional_embeddings": 4},
        lambda: {"hidden_states": r(2, 8), "timestep": t(), "proj_embedding": r(2, 8),
                 "encoder_hidden_states": r(2, 7, 8)},
    ),
    "QwenImage21Transformer2DModel": S(
        {"in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
         "context_in_dim": 12, "axes_dims_rope": (8, 4, 4)},
        _qwen21,
    ),
    "QwenImageTransformer2DModel": S(
        _QWEN,
        lambda: {"hidden_states": r(2, 16, 16), "encoder_hidden_states": r(2, 6, 12), "timestep": t(value=0.5),
                 "encoder_hidden_states_mask": ones(2, 6, dtype=torch.int64), "img_shapes": [[(1, 4, 4)]] * 2},
    ),
    "SD3Transformer2DModel": S(
        {**_HEADS, "sample_size": 8, "in_channels": 4, "num_layers": 2, "joint_attention_dim": 12,
         "caption_projection_dim": 16, "pooled_projection_dim": 10, "out_channels": 4, "pos_embed_max_size": 16},
        lambda: latents() | {"pooled_projections": r(2, 10)},
    ),
    "SanaTransformer2DModel": S(
        {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2,
         "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12, "sample_size": 8},
        latents,
    ),
    "StableAudio3DiTModel": S(
        _STABLE_AUDIO_3,
        lambda: {"hidden_states": r(2, 8, 16), "timestep": t(value=0.5), "encoder_hidden_states": r(2, 4, 16),
                 "global_hidden_states": r(2, 12)},
    ),
    "StableAudioDiTModel": S(
        {**_HEADS, "sample_size": 16, "in_channels": 4, "num_layers": 2, "num_key_value_attention_heads": 1,
         "out_channels": 4, "cross_attention_dim": 16, "time_proj_dim": 8, "global_states_input_dim": 12,
         "cross_attention_input_dim": 12},
        lambda: {"hidden_states": r(2, 4, 16), "timestep": t(value=0.5), "encoder_hidden_states": r(2, 5, 12),
                 "global_hidden_states": r(2, 1, 12), "rotary_embedding": (r(17, 4), r(17, 4))},
    ),
    "Transformer2DModel": S(
        {**_HEADS, "in_channels": 4, "num_layers": 2, "patch_size": 2, "sample_size": 8, "num_embeds_ada_norm": 10,
         "norm_type": "ada_norm_zero", "out_channels": 4, "norm_elementwise_affine": False},
        lambda: {"hidden_states": r(2, 4, 8, 8), "timestep": whole(), "class_labels": indices(2)},
    ),
    "ZImageTransformer2DModel": S(
        {"in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
         "cap_feat_dim": 12, "axes_dims": [4, 4, 8], "axes_lens": [256, 32, 32]},
        lambda: {"x": [r(4, 1, 8, 8), r(4, 1, 8, 8)], "t": t(value=0.5), "cap_feats": [r(6, 12), r(6, 12)]},
    ),
}  # fmt: skip
"""By class name."""
