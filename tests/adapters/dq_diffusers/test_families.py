"""The partition of every architecture that diffusers configs describe, against names that a person would list."""

from __future__ import annotations

import functools
import re

import diffusers
import pytest
import torch
from dq_diffusers.example_inputs import example_inputs
from tiny_configs import CONFIGS

from dq_plugins.errors import TraceError
from dq_plugins.graph import Partition, partition

# Per family: patterns of what depends on t alone, on conditions alone, on both; the first and the last layer.
FAMILIES: dict[str, tuple[str, str, str, str, str]] = {
    "unet": (r"time_emb", r"-", r"-", "conv_in", "conv_out"),
    "unet-text": (r"time_emb", r"attn2\.to_[kv]$", r"-", "conv_in", "conv_out"),
    "unet-text-sizes": (
        r"time_embedding", r"attn2\.to_[kv]$|add_embedding", r"time_emb_proj", "conv_in", "conv_out",
    ),
    "unet-scale-shift": (
        r"time_embedding", r"add_[kv]_proj|add_embedding|encoder_hid_proj", r"time_emb_proj", "conv_in", "conv_out",
    ),
    "dit": (r"timestep_embedder", r"class_embedder", r"norm1\.linear|proj_out_1", "pos_embed.proj", "proj_out_2"),
    "pixart": (r"adaln_single", r"attn2\.to_[kv]$|caption", r"-", "pos_embed.proj", "proj_out"),
    "sd3": (
        r"timestep_embedder", r"text_embedder|context_embedder",
        r"norm1(_context)?\.linear|norm_out\.linear|transformer_blocks\.0\.attn\.add_[qkv]_proj",
        "pos_embed.proj", "proj_out",
    ),
    "flux": (
        r"timestep_embedder", r"text_embedder|guidance_embedder|context_embedder",
        r"norm(1|1_context|_out)?\.linear|^transformer_blocks\.0\.attn\.add_[qkv]_proj",
        "x_embedder", "proj_out",
    ),
    "sana": (r"time_embed", r"attn2\.to_[kv]$|caption", r"-", "patch_embed.proj", "proj_out"),
    "wan": (r"time_(embedder|proj)", r"attn2\.to_[kv]$|text_embedder", r"-", "patch_embedding", "proj_out"),
    "ltx": (r"time_embed", r"attn2\.to_[kv]$|caption", r"-", "proj_in", "proj_out"),
    "hunyuan-dit": (
        r"timestep_embedder",
        r"attn2\.to_[kv]$|text_embedder|pooler|extra_embedder|style_embedder",
        r"norm1\.linear|norm_out\.linear", "pos_embed.proj", "proj_out",
    ),
    "cogvideox": (
        r"time_embedding|norm[12]\.linear|norm_out\.linear", r"text_proj", r"-", "patch_embed.proj", "proj_out",
    ),
}  # fmt: skip
TRACED_ONLY = ["chroma", "hunyuan-video", "z-image", "qwen-image", "mochi"]


@functools.cache
def partition_of(name: str) -> Partition:
    cls, config = CONFIGS[name]
    with torch.device("meta"):
        model = getattr(diffusers, cls)(**config)
    return partition(model, example_inputs(model, size=8, frames=2, text_length=5))


def matching(part: Partition, pattern: str) -> set[str]:
    return {name for name in part.layers if re.search(pattern, name)}


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_are_those_a_person_would_list(name):
    temporal, condition, mixed, first, last = FAMILIES[name]
    part = partition_of(name)
    assert part.temporal == matching(part, temporal)
    assert part.condition == matching(part, condition)
    assert part.mixed == matching(part, mixed)
    assert part.with_role("first") == (first,)
    assert part.with_role("last") == (last,)
    keys = matching(part, r"attn2\.to_k$|add_k_proj") & part.condition
    assert set(part.with_role("cross_attention_key")) == keys
    assert set(part.with_role("cross_attention_value")) == {re.sub("k(_proj)?$", r"v\1", key) for key in keys}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("unet")])
def test_shortcuts_and_resampling_of_unets(name):
    part = partition_of(name)
    assert set(part.with_role("shortcut")) == matching(part, "conv_shortcut")
    assert set(part.with_role("downsample")) == matching(part, r"downsamplers\.0\.conv$")
    assert set(part.with_role("upsample")) == matching(part, r"upsamplers\.0\.(conv|conv1)$")


@pytest.mark.parametrize("name", TRACED_ONLY)
def test_every_other_family_is_traced_with_one_first_and_one_last_layer(name):
    part = partition_of(name)
    assert part.timestep == ("t" if name == "z-image" else "timestep")
    assert part.temporal
    assert len(part.with_role("first")) == 1
    assert len(part.with_role("last")) == 1
    assert any("sample" in tensor.reaches for tensor in part.block_boundary)


def test_a_family_that_reads_tensor_values_is_traced_where_it_has_some():
    with pytest.raises(TraceError, match=r"Lumina2Transformer2DModel cannot be traced.*reads tensor values"):
        partition_of("lumina2")
    cls, config = CONFIGS["lumina2"]
    torch.manual_seed(0)
    model = getattr(diffusers, cls)(**config).eval()
    inputs = example_inputs(model, size=8, text_length=5)
    given = {
        name: torch.ones(x.shape, dtype=x.dtype) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()
    }
    part = partition(model, given)
    assert part.temporal == matching(part, r"^time_caption_embed\.timestep|norm1\.linear|^norm_out\.linear_1")
    assert part.condition == matching(part, r"^context_refiner|caption_embedder")
    assert len(part.with_role("first")) == len(part.with_role("last")) == 1
