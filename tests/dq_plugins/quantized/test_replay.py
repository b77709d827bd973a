"""Handing outputs on from block to block gives what running both denoisers from the start gives, bit for bit."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any

import diffusers
import pytest
import torch
from tiny_configs import CONFIGS
from torch import Tensor, nn

import dq_plugins as dq
from dq_plugins.calibration.call import first_tensor
from dq_plugins.graph.arguments import named_leaves
from dq_plugins.hooks import hooked
from dq_plugins.quantized.block_cache import BlockRecorder
from dq_plugins.quantized.layer import LayerState
from dq_plugins.quantized.reconstruction_units import find_units
from dq_plugins.quantized.replay import redirected
from dq_plugins.quantized.run import QuantizedRun


class Tokens(nn.Module):
    """A residual block of tokens ``[N, L, C]``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        return x + self.b(torch.relu(self.a(x)))


class Pair(Tokens):
    """Gives two tensors, one of them transposed, and one of them twice."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, {"skip": (2 * y).transpose(1, 2), "same": [y]}


class Greedy(Tokens):
    """Writes into its input."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.mul_(0.5))


class Outer(nn.Module):
    """A residual block around another, which runs elsewhere, too."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(6, 6), Tokens(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(self.inner(self.enter(x)))


class Odd(nn.Module):
    """Blocks that run twice in a call, give tuples, write into what they get, and hold another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(12, 6)
        self.again, self.pair, self.greedy, self.outer, self.end = Tokens(), Pair(), Greedy(), Outer(), Tokens()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.again(self.first(sample * (1 + timestep / 1000)))
        x, more = self.pair(x)
        more["same"][0] += 1  # x, too
        hidden = self.again(x).clone()
        x = self.outer(self.greedy(hidden) + hidden)
        x = self.outer.inner(x)
        x *= 2  # into what a block gave
        x = self.end(x)
        return self.last(torch.cat([x, more["skip"].transpose(1, 2)], dim=-1))


def odd() -> nn.Module:
    torch.manual_seed(0)
    return Odd().eval().requires_grad_(False)


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind, config = CONFIGS[name]
    return getattr(diffusers, kind)(**config).eval().requires_grad_(False)


def sample_odd(denoiser: nn.Module) -> None:
    for t in (900, 500):
        denoiser(torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(t)), torch.tensor(float(t)))


def sample_unet(denoiser: nn.Module) -> None:
    config, text = denoiser.config, {}
    if "cross_attention_dim" in config:
        text = {"encoder_hidden_states": torch.randn(2, 3, config.cross_attention_dim)}
    for t in (900, 500):
        x = torch.randn(2, config.in_channels, 8, 8, generator=torch.Generator().manual_seed(t))
        denoiser(sample=x, timestep=torch.tensor(t), **text)


def sample_dit(denoiser: nn.Module) -> None:
    for t in (900, 500):
        size, channels = denoiser.config.sample_size, denoiser.config.in_channels
        x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(t))
        denoiser(hidden_states=x, timestep=torch.tensor([t, t]), class_labels=torch.tensor([0, 1]))


CASES = {
    "odd": (odd, sample_odd),
    "unet": (lambda: tiny("unet"), sample_unet),
    "unet-text": (lambda: tiny("unet-text"), sample_unet),
    "dit": (lambda: tiny("dit"), sample_dit),
}


class Reached(Exception):  # noqa: N818
    pass


def from_the_start(run: QuantizedRun, module: str, call: Any, states: dict[str, LayerState]) -> tuple[Any, ...]:
    """Arguments and target of the first run of a block, from whole runs of both denoisers."""
    seen: list[Any] = []

    def after(_: str, __: Any, ___: Any, output: Any) -> None:
        seen.append(first_tensor(output).clone())
        raise Reached

    def before(_: str, args: Any, kwargs: Any) -> None:
        seen.extend([args, kwargs])
        raise Reached

    block = {module: run.denoiser.get_submodule(module)}
    run.use({})
    with torch.no_grad(), hooked(block, after=after), suppress(Reached):
        call.run(run.denoiser)
    run.use(states)
    with torch.no_grad(), hooked(block, before=before, first=True), suppress(Reached):
        call.run(run.denoiser)
    target, args, kwargs = seen
    return args, kwargs, target


def alike(found: Any, expected: Any) -> bool:
    pairs = zip(named_leaves({"": found}), named_leaves({"": expected}), strict=True)
    return all(
        a == b and (torch.equal(x, y) and x.stride() == y.stride() if isinstance(y, Tensor) else x is y or x == y)
        for (a, x), (b, y) in pairs
    )


@pytest.mark.parametrize("name", CASES)
def test_inputs_and_targets_are_those_of_whole_runs_and_each_layer_runs_once(name: str, tmp_path) -> None:
    make, sample = CASES[name]
    denoiser = make()
    calls = dq.record(denoiser, sample, tmp_path / "calib", progress=False)
    part = dq.partition(denoiser, calls.example_inputs())
    layers = [n for n, info in part.layers.items() if not info.lookup]
    units = find_units(part, layers)
    recorder = BlockRecorder(units, calls, tmp_path / "blocks")
    weights = {n: denoiser.get_submodule(n).weight for n in layers}
    states = {n: LayerState((w * 8).round() / 8) for n, w in weights.items()}
    ran: Counter[str] = Counter()

    def count(layer: str, _: Any, __: Any) -> None:
        ran[layer] += 1

    modules = {n: denoiser.get_submodule(n) for n in layers}
    classes = {n: type(m) for n, m in denoiser.named_modules()}
    with torch.no_grad(), QuantizedRun(denoiser, layers, {}, calls.timestep_argument) as run:
        for unit in units:
            with hooked(modules, before=count):
                cache = recorder.record(run, unit, lambda states=states: states)
            assert len(cache) == len(calls) == 2
            for index, call in enumerate(calls.calls()):
                found = cache.get(index)
                args, kwargs, target = from_the_start(run, unit.module, call, states)
                assert alike((found.args, found.kwargs), (args, kwargs)), unit.module
                assert torch.equal(found.target, target), unit.module
            run.use({})
            states = {**states, **{n: LayerState((weights[n] * 16).round() / 16) for n in unit.layers}}  # learned
    assert classes == {n: type(m) for n, m in denoiser.named_modules()}
    once = {"odd": {"again": 2, "inner": 2}}.get(name, {})  # runs in a call
    for layer, times in ran.items():
        runs = next((many for part, many in once.items() if part in layer), 1)
        elsewhere = "greedy" in layer or "embedder" in layer  # writes into its input; called outside of its block, too
        assert times <= 2 * runs * len(calls) or elsewhere, layer


def test_only_what_is_needed_lies_on_disk(tmp_path) -> None:
    denoiser = odd()
    calls = dq.record(denoiser, sample_odd, tmp_path / "calib", progress=False)
    part = dq.partition(denoiser, calls.example_inputs())
    units = find_units(part, list(part.layers))
    recorder = BlockRecorder(units, calls, tmp_path / "blocks")
    with torch.no_grad(), QuantizedRun(denoiser, [], {}, "timestep") as run:
        for unit in units:
            recorder.record(run, unit, dict)
            kept = recorder.shelf
            assert sum(1 for key in kept if key[0] == "input") == len(calls)
            assert {key[1] for key in kept if key[0] == "target"} == {u.module for u in units[units.index(unit) :]}
            assert len(list((tmp_path / "blocks").iterdir())) == len(kept)


def test_modules_have_their_classes_back_after_an_error() -> None:
    denoiser = odd()

    def fail(*_: Any) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError), redirected({"again": denoiser.again}, fail):
        denoiser(torch.zeros(1, 5, 6), torch.tensor(1.0))
    assert type(denoiser.again) is Tokens
    assert denoiser(torch.zeros(1, 5, 6), torch.tensor(1.0)).shape == (1, 5, 6)
