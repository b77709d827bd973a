"""Calibrate under a cache: a quantized transformer that skips blocks sees other inputs than one that computes them all.

    python examples/under_cache.py --cache first-block --threshold 0.15
    python examples/under_cache.py --cache taylorseer --bits 6

diffusers' caches (first-block cache, TaylorSeer) leave blocks or attentions out at some steps and put an estimate in
their place. What later layers then see was never seen by a calibration that computed every step. Calibrating by
sampling sees what really happens: it observes the layers that run, with the inputs they get, as often as they run.

Three quantized transformers are compared with the full-precision one *under the same cache*, from the same noise:
calibrated without the cache, with it, and, for scale, the full-precision transformer without any cache.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.models.cache_utils import CacheMixin
from dq_diffusers.recording import denoiser_of, load_pipeline, sampler
from dq_torchao import TimestepInt8Config, linear_and_conv2d
from torch import Tensor, nn
from torchao.quantization import quantize_

from dq_plugins.bundled_denoisers import bundled


class CachingDiT(DiTTransformer2DModel, CacheMixin):
    """The transformer of the digits with diffusers' cache methods, which its class does not have by itself."""

    @functools.wraps(DiTTransformer2DModel.forward)  # the timestep is found by the argument's name
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One denoiser call; guidance is one batch, so there is one context."""
        with self.cache_context("cond"):
            return super().forward(*args, **kwargs)


def caching_pipeline() -> Any:
    """The digits' pipeline; its transformer can be cached."""
    path = bundled("digits")
    pipe = load_pipeline(path)
    transformer = CachingDiT.from_pretrained(path / "transformer")
    pipe.register_modules(transformer=transformer.eval().requires_grad_(False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cache_config(name: str, threshold: float) -> Any:
    """A cache of diffusers by name."""
    if name == "first-block":
        return FirstBlockCacheConfig(threshold=threshold)
    blocks = [r"transformer_blocks\.\d+\.(attn1|ff)"]  # of a DiT; the default looks for other names
    exact = {"taylor_factors_dtype": torch.float32, "cache_identifiers": blocks}
    return TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, **exact)


def images(pipe: Any, count: int, steps: int, seed: int) -> Tensor:
    """Final images ``[count, H, W, C]`` in [0, 1]."""
    outputs = sampler(pipe, images=count, steps=steps, seed=seed, batch=count)(denoiser_of(pipe)[1])
    return torch.cat([torch.as_tensor(output.images) for output in outputs])


def quantized(pipe: Any, config: Any, *, cached: bool, options: Mapping[str, Any], count: int, steps: int) -> nn.Module:
    """The pipeline's transformer, calibrated by sampling with the cache on or off; the cache is on afterwards."""
    transformer = pipe.transformer
    quantize_(transformer, TimestepInt8Config(step="prepare", **options), linear_and_conv2d)
    if cached:
        transformer.enable_cache(config)
    images(pipe, count, steps, seed=0)
    quantize_(transformer, TimestepInt8Config(step="convert", **options), linear_and_conv2d)
    if not cached:
        transformer.enable_cache(config)
    return transformer


def errors(found: Tensor, reference: Tensor) -> list[float]:
    """Mean square error of every image."""
    return (found - reference).square().flatten(1).mean(1).tolist()


def compare(
    cache: str, *, threshold: float, bits: int, count: int, steps: int, seed: int = 10_000
) -> dict[str, list[float]]:
    """Errors to the full-precision transformer under the same cache, by how it was calibrated."""
    config, options = cache_config(cache, threshold), {"groups": 4, "act_bits": bits}
    pipe = caching_pipeline()
    plain = images(pipe, count, steps, seed)
    pipe.transformer.enable_cache(config)
    reference = images(pipe, count, steps, seed)
    found = {"full precision, no cache": errors(plain, reference)}
    for label, cached in (("calibrated without the cache", False), ("calibrated under the cache", True)):
        pipe = caching_pipeline()
        quantized(pipe, config, cached=cached, options=options, count=count, steps=steps)
        found[label] = errors(images(pipe, count, steps, seed), reference)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="first-block", choices=("first-block", "taylorseer"))
    parser.add_argument("--threshold", type=float, default=0.15, help="of the first-block cache")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    found = compare(args.cache, threshold=args.threshold, bits=args.bits, count=args.images, steps=args.steps)
    for label, each in found.items():
        print(f"{label:32} mean square error {sum(each) / len(each):.3e}, worst image {max(each):.3e}")


if __name__ == "__main__":
    main()
