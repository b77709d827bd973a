"""Arguments of one call of a diffusers denoiser, made from its forward's signature and its config.

Values are random where they are floats, zero where they are indices, one where they are masks; shapes are what
counts. ``B`` is the batch, ``L`` the length of the text, ``N`` the number of image tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.errors import TraceError

_FRAMES_BEFORE_CHANNELS = ("CogVideoXTransformer3DModel", "UNetSpatioTemporalConditionModel")
_AUDIO = ("UNet1D", "StableAudio")
_VIDEO = ("3DModel", "3DConditionModel", "MotionModel")


@dataclass(frozen=True)
class _Example:
    """One call that is being put together: what the rules below look at."""

    model: nn.Module
    config: Mapping[str, Any]
    names: frozenset[str]
    batch: int
    height: int
    width: int
    frames: int
    text: int
    device: torch.device

    @property
    def kind(self) -> str:
        return type(self.model).__name__

    @property
    def tokens(self) -> bool:
        """Whether the sample is a sequence ``[B, N, C]`` that the caller has cut into patches."""
        return bool({"img_ids", "img_shapes"} & self.names) or {"num_frames", "height", "width"} <= self.names

    @property
    def video(self) -> bool:
        return self.kind.endswith(_VIDEO) or self.kind in _FRAMES_BEFORE_CHANNELS

    def get(self, *keys: str, default: Any = None) -> Any:
        """The first of these fields that the config sets; of a per-block list, the first entry."""
        value = next((self.config[k] for k in keys if self.config.get(k) is not None), default)
        return value[0] if isinstance(value, list | tuple) else value

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=next(self.model.parameters()).dtype)

    def indices(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=torch.int64)

    def ones(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.ones(shape, device=self.device, dtype=dtype)


def example_inputs(
    model: nn.Module,
    batch: int = 1,
    size: int | tuple[int, int] | None = None,
    frames: int | None = None,
    text_length: int | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Keyword arguments of one call of a diffusers denoiser.

    Args:
        model: a U-Net or transformer of diffusers, on any device.
        batch: ``B``.
        size: height and width of the sample as the denoiser takes it (latent pixels, or tokens where the caller
            cuts patches); by default the config's, or 64.
        frames: frames of the sample, for video; by default the config's, or 8.
        text_length: ``L``; by default 77, or what the config fixes.
        device: where to put the tensors; by default the model's device.

    Returns:
        The arguments, ``return_dict`` included.

    Raises:
        TraceError: the model's forward requires an argument that is not known here.
    """
    parameters = dict(list(inspect.signature(type(model).forward).parameters.items())[1:])
    config: Mapping[str, Any] = getattr(model, "config", {})
    height, width = _size(config, size)
    call = _Example(
        model=model,
        config=config,
        names=frozenset(parameters),
        batch=batch,
        height=height,
        width=width,
        frames=frames or config.get("sample_frames") or config.get("num_frames") or config.get("video_length") or 8,
        text=text_length or config.get("text_len") or 77,
        device=torch.device(device) if device is not None else next(model.parameters()).device,
    )
    inputs = {}
    for name, parameter in parameters.items():
        value = _RULES[name](call) if name in _RULES else None
        if value is not None:
            inputs[name] = value
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            raise TraceError(
                f"{type(model).__name__}.forward requires the argument {name!r}, for which no example is known. Call "
                "dq_plugins.partition(denoiser, example_inputs) from Python with a dictionary of one call's arguments."
            )
    return inputs


def _size(config: Mapping[str, Any], size: int | tuple[int, int] | None) -> tuple[int, int]:
    height = size or (config.get("sample_height") or config.get("sample_size") or 64)
    width = size or (config.get("sample_width") or config.get("sample_size") or 64)
    return (
        height[0] if isinstance(height, list | tuple) else height,
        width[1] if isinstance(width, list | tuple) else width,
    )


def _sample(call: _Example) -> Tensor:
    channels = call.get("in_channels", "in_visual_dim", default=4)
    if call.tokens:
        frames = call.frames if "num_frames" in call.names else 1
        return call.floats(call.batch, frames * call.height * call.width, channels)
    if call.kind.startswith(_AUDIO):
        return call.floats(call.batch, channels - call.get("extra_in_channels", default=0), call.width)
    space = (call.height, call.width)
    if call.kind in _FRAMES_BEFORE_CHANNELS:
        return call.floats(call.batch, call.frames, channels, *space)
    return call.floats(call.batch, channels, *((call.frames,) if call.video else ()), *space)


def _timestep(call: _Example) -> Tensor:
    whole = "UNet" in call.kind or call.kind.startswith(("DiT", "PixArt"))
    t = torch.full((call.batch,), 500 if whole else 0.5, device=call.device)
    return t.to(torch.int64) if whole else t.to(next(call.model.parameters()).dtype)


def _text(call: _Example) -> Any:
    width = call.get(
        "caption_channels", "encoder_hid_dim", "joint_attention_dim", "text_embed_dim", "text_dim", "in_text_dim",
        "cap_feat_dim", "context_in_dim", "cross_attention_input_dim", "cross_attention_dim",
    )  # fmt: skip
    return None if width is None else call.floats(call.batch, call.text, width)


def _text_mask(call: _Example) -> Tensor | None:
    # Most models read a missing mask as "all of the text counts"; those that require one say so by having no default.
    required = inspect.signature(type(call.model).forward).parameters["encoder_attention_mask"].default
    return call.ones(call.batch, call.text) if required is inspect.Parameter.empty else None


def _classes(call: _Example) -> Tensor | None:
    if call.get("class_embed_type") == "timestep":
        return call.floats(call.batch)
    if call.get("class_embed_type") in ("projection", "simple_projection"):
        return call.floats(call.batch, call.get("projection_class_embeddings_input_dim"))
    counted = call.get("num_class_embeds") is not None or call.kind.startswith("DiT")
    return call.indices(call.batch) if counted else None


def _added_conditions(call: _Example) -> dict[str, Tensor] | None:
    if call.kind.startswith("PixArt"):
        if not call.get("use_additional_conditions", default=call.get("sample_size") == 128):
            return None
        return {"resolution": call.floats(call.batch, 2), "aspect_ratio": call.floats(call.batch, 1)}
    kind = call.get("addition_embed_type")
    if kind == "text_time":  # SDXL: pooled text and six size numbers, projected together
        each = call.get("addition_time_embed_dim")
        pooled = call.get("projection_class_embeddings_input_dim") - 6 * each
        return {"text_embeds": call.floats(call.batch, pooled), "time_ids": call.floats(call.batch, 6)}
    if kind in ("image", "text_image") or call.get("encoder_hid_dim_type") in ("image_proj", "text_image_proj"):
        width = call.get("encoder_hid_dim") if kind == "image" else call.get("cross_attention_dim")
        return {"image_embeds": call.floats(call.batch, width)}
    return None


def _rotary(call: _Example) -> tuple[Tensor, Tensor] | None:
    if call.kind.startswith("HunyuanDiT"):
        patches = (call.height // call.get("patch_size")) * (call.width // call.get("patch_size"))
    elif call.kind.startswith("CogVideoX") and call.get("use_rotary_positional_embeddings"):
        per_frame = (call.height // call.get("patch_size")) * (call.width // call.get("patch_size"))
        patches = per_frame * (call.frames // (call.get("patch_size_t") or 1))
    else:
        return None
    head = call.get("attention_head_dim") or call.get("hidden_size") // call.get("num_attention_heads")
    return call.floats(patches, head), call.floats(patches, head)


def _vectors(*widths: str) -> Callable[[_Example], Any]:
    """A rule for an argument ``[B, C]``, where the config sets one of these fields to ``C``."""
    return lambda call: None if (width := call.get(*widths)) is None else call.floats(call.batch, width)


def _positions(count: Callable[[_Example], int]) -> Callable[[_Example], Any]:
    """A rule for the positions ``[N, axes]`` of so many tokens."""
    return lambda call: call.floats(count(call), len(call.config.get("axes_dims_rope", (0, 0, 0))))


def _only(kinds: str | tuple[str, ...], make: Callable[[_Example], Any]) -> Callable[[_Example], Any]:
    """A rule for the classes whose names start with ``kinds``; elsewhere the argument is left out."""
    return lambda call: make(call) if call.kind.startswith(kinds) else None


_RULES: Mapping[str, Callable[[_Example], Any]] = {
    "sample": _sample,
    "hidden_states": _sample,
    "timestep": _timestep,
    "timesteps": _timestep,
    "encoder_hidden_states": _text,
    "encoder_attention_mask": _text_mask,
    "pooled_projections": _vectors("pooled_projection_dim", "in_text_dim2"),
    "class_labels": _classes,
    "guidance": lambda call: call.floats(call.batch) if call.get("guidance_embeds") else None,
    "img_ids": _positions(lambda call: call.height * call.width),
    "txt_ids": _positions(lambda call: call.text),
    "img_shapes": lambda call: [[(1, call.height, call.width)]] * call.batch,
    "added_cond_kwargs": _added_conditions,
    "timestep_cond": _vectors("time_cond_proj_dim"),
    "image_rotary_emb": _rotary,
    "num_frames": _only("LTX", lambda call: call.frames),
    "height": _only("LTX", lambda call: call.height),
    "width": _only("LTX", lambda call: call.width),
    # HunyuanDiT: two text encoders, and before version 1.2 a style and six size numbers
    "text_embedding_mask": _only("HunyuanDiT", lambda call: call.ones(call.batch, call.text)),
    "text_embedding_mask_t5": _only("HunyuanDiT", lambda call: call.ones(call.batch, call.get("text_len_t5"))),
    "encoder_hidden_states_t5": _only(
        "HunyuanDiT", lambda call: call.floats(call.batch, call.get("text_len_t5"), call.get("cross_attention_dim_t5"))
    ),
    "image_meta_size": _only("HunyuanDiT", lambda call: call.floats(call.batch, 6)),
    "style": _only("HunyuanDiT", lambda call: call.indices(call.batch)),
    # CogView: sizes and crop as conditions
    "original_size": _only("CogView", lambda call: call.floats(call.batch, 2)),
    "target_size": _only("CogView", lambda call: call.floats(call.batch, 2)),
    "crop_coords": _only("CogView", lambda call: call.floats(call.batch, 2)),
    # Z-Image: lists of unbatched tensors
    "x": _only(
        "ZImage",
        lambda call: [call.floats(call.get("in_channels"), 1, call.height, call.width) for _ in range(call.batch)],
    ),
    "t": _only("ZImage", _timestep),
    "cap_feats": _only("ZImage", lambda call: [call.floats(call.text, call.get("cap_feat_dim"))] * call.batch),
    # Stable Video Diffusion: frame rate, motion and noise augmentation
    "added_time_ids": _only("UNetSpatioTemporal", lambda call: call.floats(call.batch, 3)),
    # Stable Audio
    "global_hidden_states": lambda call: call.floats(call.batch, 1, call.get("global_states_input_dim", default=1)),
    # Cosmos
    "fps": _only("Cosmos", lambda call: 16),
    "padding_mask": _only("Cosmos", lambda call: call.floats(1, 1, call.height, call.width)),
    "return_dict": lambda call: False,
}
"""How to make an argument, by its name; None leaves it out."""
