"""The example runs, and a calibration under a cache sees the calls that really happen."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import dq_torchao
import pytest
from dq_diffusers.recording import sampler
from dq_torchao import TimestepInt8Config, linear_and_conv2d
from torchao.quantization import quantize_

import dq_plugins as dq
from dq_plugins.errors import CalibrationError

EXAMPLE = Path(__file__).parents[2] / "examples" / "under_cache.py"
COUNT, STEPS = 2, 6


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("under_cache", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("cache", ["first-block", "taylorseer"])
def test_layers_are_observed_as_often_as_they_run(example, cache):
    pipe = example.caching_pipeline()
    transformer = pipe.transformer
    inner = transformer.get_submodule("transformer_blocks.2.attn1.to_q")
    runs = []
    quantize_(transformer, TimestepInt8Config(step="prepare", groups=2), linear_and_conv2d)
    transformer.enable_cache(example.cache_config(cache, 0.3))
    inner.register_forward_hook(lambda *_: runs.append(1))
    example.images(pipe, COUNT, STEPS, seed=0)
    assert 0 < len(runs) < STEPS  # the cache left some out
    quantize_(transformer, TimestepInt8Config(step="convert"), linear_and_conv2d)
    report = dq_torchao.execution_report(transformer)
    assert report["transformer_blocks.2.attn1.to_q"].state == "integer"
    before = len(runs)
    found = example.images(pipe, COUNT, STEPS, seed=0)
    assert found.isfinite().all()
    assert 0 < len(runs) - before < STEPS  # and the quantized one is cached too
    # what planning called has left nothing in the cache: the first images are those of any other run
    assert found.equal(example.images(pipe, COUNT, STEPS, seed=0))


def test_recorded_calls_and_plans_from_them_refuse_a_cache(example, tmp_path):
    pipe = example.caching_pipeline()
    denoiser = pipe.transformer
    run = sampler(pipe, images=1, steps=2)
    calib = dq.record(denoiser, run, tmp_path / "a", progress=False)
    denoiser.enable_cache(example.cache_config("first-block", 0.3))
    for attempt in (
        lambda: dq.record(denoiser, run, tmp_path / "b", progress=False),
        lambda: dq.make_plan(denoiser, calib, "fast", progress=False),
    ):
        with pytest.raises(CalibrationError, match="cache is enabled"):
            attempt()
    denoiser.disable_cache()
    dq.record(denoiser, run, tmp_path / "b", progress=False)


def test_the_example_compares_with_full_precision_under_the_same_cache(example):
    found = example.compare("first-block", threshold=0.3, bits=8, count=COUNT, steps=STEPS)
    assert set(found) == {
        "full precision, no cache", "calibrated without the cache", "calibrated under the cache"
    }  # fmt: skip
    assert max(found["calibrated under the cache"]) < 0.02
