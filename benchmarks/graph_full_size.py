"""Partition full-size denoisers from their configs: what depends on what, and how long finding out takes.

    python benchmarks/graph_full_size.py [NAME ...]

No weights are needed: models are built on the meta device. Prints one line of Markdown table a model: parameters, and
the shares that depend on the timestep alone, on conditions alone, and on both, which a temporal table or one batched
call before the sampling loop takes out of every step.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from dq_diffusers.building import build_from_config
from dq_diffusers.example_inputs import example_inputs

from dq_plugins.commands.inspect import human
from dq_plugins.graph import partition, summarise

SD15 = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
DIT_XL = {
    "_class_name": "DiTTransformer2DModel",
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 32,
    "num_embeds_ada_norm": 1000,
    "activation_fn": "gelu-approximate",
}
PIXART_XL = {
    "_class_name": "PixArtTransformer2DModel",
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "sample_size": 64,
}
SD3_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pos_embed_max_size": 192,
}
FLUX_DEV = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}

MODELS = {
    "SD-1.5 U-Net": SD15,
    "DiT-XL/2": DIT_XL,
    "PixArt-XL/2": PIXART_XL,
    "SD3-medium": SD3_MEDIUM,
    "FLUX.1-dev": FLUX_DEV,
}


def main(names: list[str]) -> None:
    print("| model | parameters | MACs | t alone | conditions alone | t and conditions | seconds |")
    print("|---|---|---|---|---|---|---|")
    for name in names or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(MODELS[name]))
            started = time.perf_counter()
            model = build_from_config(folder)
            summary = summarise(partition(model, example_inputs(model)))
            seconds = time.perf_counter() - started
        total = summary["parameters"]
        cells = [
            f"{human(row['parameters'])} in {row['layers']} layers ({100 * row['parameters'] / total:.1f} %)"
            for row in (summary["signatures"][key] for key in ("temporal", "condition", "mixed"))
        ]
        print(f"| {name} | {human(total)} | {human(summary['macs']['total'])} | {' | '.join(cells)} | {seconds:.0f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
