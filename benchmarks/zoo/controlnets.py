"""ControlNets of diffusers: their outputs are residuals for a denoiser, none of which looks like a sample."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.zoo.image_transformers import IMAGE_TRANSFORMERS, latents, tokens
from benchmarks.zoo.specimen import Inputs, Specimen, ones, r, t, whole

S = Specimen
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_UNET = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 12,
         "conditioning_embedding_out_channels": (4, 8)}  # fmt: skip
_2D = {**_UNET, "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
_UNION = {**_2D, "num_control_type": 2, "num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8,
          "addition_embed_type": None, "projection_class_embeddings_input_dim": 16,
          "addition_time_embed_dim": 4}  # fmt: skip
_FLUX = {**_HEADS, "attention_head_dim": 16, "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (4, 4, 8)}  # fmt: skip
_SD3 = {**_HEADS, "sample_size": 8, "in_channels": 4, "num_layers": 1, "joint_attention_dim": 12,
        "caption_projection_dim": 16, "pooled_projection_dim": 10, "out_channels": 4,
        "pos_embed_max_size": 16}  # fmt: skip
_HUNYUAN = {**_HEADS, "sample_size": 8, "transformer_num_layers": 4, "patch_size": 2, "cross_attention_dim": 12,
            "cross_attention_dim_t5": 16, "pooled_projection_dim": 16, "hidden_size": 16, "in_channels": 4,
            "text_len": 5, "text_len_t5": 6}  # fmt: skip
_QWEN = {**_HEADS, "attention_head_dim": 16, "in_channels": 16, "out_channels": 4, "num_layers": 1,
         "joint_attention_dim": 12, "axes_dims_rope": (8, 4, 4)}  # fmt: skip


def _image(size: int = 8) -> Inputs:
    return {"sample": r(2, 4, size, size), "timestep": whole(), "encoder_hidden_states": r(2, 6, 12),
            "controlnet_cond": r(2, 3, 2 * size, 2 * size), "return_dict": False}  # fmt: skip


def _flux() -> Inputs:
    return tokens() | {"controlnet_cond": r(2, 16, 4), "pooled_projections": r(2, 10)}


def _sd3() -> Inputs:
    return latents() | {"controlnet_cond": r(2, 4, 8, 8), "pooled_projections": r(2, 10)}


def _hunyuan() -> Inputs:
    return latents(length=5) | {
        "controlnet_cond": r(2, 4, 8, 8), "text_embedding_mask": ones(2, 5), "encoder_hidden_states_t5": r(2, 6, 16),
        "text_embedding_mask_t5": ones(2, 6), "image_meta_size": r(2, 6),
        "style": torch.zeros(2, dtype=torch.int64), "image_rotary_emb": (r(16, 8), r(16, 8)),
    }  # fmt: skip


def _qwen() -> Inputs:
    return {"hidden_states": r(2, 16, 16), "controlnet_cond": r(2, 16, 16), "encoder_hidden_states": r(2, 6, 12),
            "timestep": t(value=0.5), "encoder_hidden_states_mask": ones(2, 6, dtype=torch.int64),
            "img_shapes": [[(1, 4, 4)]] * 2}  # fmt: skip


def _union(several: bool = False) -> Inputs:
    image, kind = r(2, 3, 16, 16), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    return _image() | {
        "controlnet_cond": [image], "control_type": [kind] if several else kind,
        "control_type_idx": [[0]] if several else [0], "conditioning_scale": [1.0] if several else 1.0,
    }  # fmt: skip


def _nets(name: str, config: dict[str, Any]) -> Any:
    """Two nets for a class that runs several."""

    def make() -> tuple[Any, ...]:
        import diffusers

        cls = getattr(diffusers, name)
        return ([cls(**config).eval().requires_grad_(False) for _ in range(2)],)

    return make


def _with_transformer(net: Any) -> Any:
    from diffusers import ZImageTransformer2DModel

    return type(net).from_transformer(
        net, ZImageTransformer2DModel(**IMAGE_TRANSFORMERS["ZImageTransformer2DModel"].config)
    )


def _twice(inputs: Inputs) -> Inputs:
    return inputs | {"controlnet_cond": [inputs["controlnet_cond"]] * 2, "conditioning_scale": [1.0, 0.5]}


def _two_unions() -> Inputs:
    one = _union()
    return one | {
        "controlnet_cond": [one["controlnet_cond"]] * 2, "control_type": [one["control_type"]] * 2,
        "control_type_idx": [[0], [0]], "conditioning_scale": [1.0, 0.5],
    }  # fmt: skip


CONTROLNETS: dict[str, Specimen] = {
    "ControlNetModel": S(_2D, _image),
    "ControlNetUnionModel": S(_UNION, _union),
    "CosmosControlNetModel": S(
        {"n_controlnet_blocks": 1, "in_channels": 6, "latent_channels": 6, "model_channels": 32, "mlp_ratio": 2,
         "num_attention_heads": 2, "attention_head_dim": 16, "text_embed_dim": 12, "adaln_lora_dim": 4,
         "max_size": (4, 32, 32), "rope_scale": (2.0, 1.0, 1.0), "extra_pos_embed_type": None,
         "img_context_dim_in": 12, "img_context_dim_out": 32, "use_crossattn_projection": False},
        lambda: {"controls_latents": r(2, 4, 1, 8, 8), "latents": r(2, 4, 1, 8, 8), "timestep": t(value=0.5),
                 "encoder_hidden_states": (r(2, 6, 12), r(2, 4, 12)), "condition_mask": ones(2, 1, 1, 8, 8),
                 "padding_mask": torch.zeros(1, 1, 8, 8)},
        outside={} if find_spec("torchvision") else {"call": "it wants torchvision, which is not installed here"},
    ),
    "FluxControlNetModel": S(_FLUX, _flux),
    "FluxMultiControlNetModel": S(
        {}, lambda: _twice(_flux()) | {"controlnet_mode": [torch.tensor([0, 1])] * 2, "return_dict": False},
        parts=_nets("FluxControlNetModel", _FLUX | {"num_mode": 2}),
    ),
    "HunyuanDiT2DControlNetModel": S(_HUNYUAN, _hunyuan),
    "HunyuanDiT2DMultiControlNetModel": S(
        {}, lambda: _twice(_hunyuan()), parts=_nets("HunyuanDiT2DControlNetModel", _HUNYUAN)
    ),
    "MultiControlNetModel": S({}, lambda: _twice(_image()), parts=_nets("ControlNetModel", _2D)),
    "MultiControlNetUnionModel": S({}, _two_unions, parts=_nets("ControlNetUnionModel", _UNION)),
    "QwenImageControlNetModel": S(_QWEN, _qwen),
    "QwenImageMultiControlNetModel": S(
        {}, lambda: _qwen() | {"controlnet_cond": [r(2, 16, 16)] * 2, "conditioning_scale": [1.0, 0.5],
                           "return_dict": False},
        parts=lambda: ([_nets("QwenImageControlNetModel", _QWEN)()[0][0]],),
    ),
    "SD3ControlNetModel": S(_SD3, _sd3),
    "SD3MultiControlNetModel": S({}, lambda: _twice(_sd3()), parts=_nets("SD3ControlNetModel", _SD3)),
    "SanaControlNetModel": S(
        {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_cross_attention_heads": 2,
         "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12, "sample_size": 8},
        lambda: latents() | {"controlnet_cond": r(2, 4, 8, 8)},
    ),
    "SparseControlNetModel": S(
        {**_UNET, "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "attention_head_dim": 4,
         "motion_num_attention_heads": 2},
        lambda: {"sample": r(2, 4, 2, 8, 8), "timestep": whole(), "encoder_hidden_states": r(4, 6, 12),
                 "controlnet_cond": r(2, 4, 2, 8, 8), "conditioning_mask": ones(2, 1, 2, 8, 8),
                 "return_dict": False},
    ),
    "UNetControlNetXSModel": S(
        {"sample_size": 8, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (4, 8),
         "cross_attention_dim": 12, "transformer_layers_per_block": 1, "num_attention_heads": 2, "norm_num_groups": 4,
         "ctrl_block_out_channels": (2, 4), "ctrl_num_attention_heads": 2, "ctrl_max_norm_num_groups": 2,
         "ctrl_conditioning_embedding_out_channels": (2, 2)},
        lambda: _image() | {"conditioning_scale": 1},
    ),
    "ZImageControlNetModel": S(
        {"control_layers_places": [0], "control_in_dim": 4, "dim": 32, "n_refiner_layers": 1, "n_heads": 2,
         "n_kv_heads": 2},
        lambda: {"x": [r(4, 1, 8, 8)] * 2, "t": t(value=0.5), "cap_feats": [r(6, 12)] * 2,
                 "control_context": [r(4, 1, 8, 8)] * 2},
        complete=_with_transformer,
    ),
}  # fmt: skip
"""By class name."""
