from __future__ import annotations

import gc
import itertools
import threading
import weakref

import pytest
import torch
from dq_torchao import LayerFilter, PlanConfig, TimestepInt8Config, linear_and_conv2d, prepare
from dq_torchao.layer_filter import denoiser_of_layer
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_
from torchao.quantization.transform_module import register_quantize_module_handler
from torchao_models import build, denoiser_plan

from dq_plugins.errors import DQError
from dq_plugins.timesteps import context_of

LINE_TO_CHANGE = (
    r"Write quantize_\(denoiser, (Probe|PlanConfig|TimestepInt8Config)\(\.\.\.\), dq_torchao\.linear_and_conv2d\)"
)


class Probe(AOBaseConfig):
    """Collects what a handler learns: the denoiser and the name, for every layer."""

    def __init__(self, inside=lambda name: None) -> None:
        self.found: list[tuple[nn.Module, str]] = []
        self.inside = inside


@register_quantize_module_handler(Probe)
def handle(layer: nn.Module, config: Probe) -> nn.Module:
    config.found.append(denoiser_of_layer(layer, "Probe", "nothing"))
    config.inside(config.found[-1][1])
    return layer


def names(config: Probe) -> list[str]:
    return [name for _, name in config.found]


ALL = ["time", "conv_in", "up", "down", "conv_out"]


def test_every_layer_comes_with_its_denoiser_and_name():
    model, probe = build(), Probe()
    quantize_(model, probe, linear_and_conv2d)
    assert names(probe) == ALL
    assert all(denoiser is model for denoiser, _ in probe.found)


def test_layers_deep_inside_have_their_whole_names():
    model, probe = nn.ModuleDict({"a": nn.ModuleList([build()])}), Probe()
    quantize_(model, probe, linear_and_conv2d)
    assert names(probe) == [f"a.0.{name}" for name in ALL]


@pytest.mark.parametrize(
    "filter_fn",
    [
        LayerFilter(lambda module, name: name in ("up", "down")),
        lambda module, name: linear_and_conv2d(module, name) and name in ("up", "down"),
        lambda module, name: name not in ("time", "conv_in", "conv_out") and linear_and_conv2d(module, name),
    ],
)
def test_filters_of_the_users(filter_fn):
    model, probe = build(), Probe()
    quantize_(model, probe, filter_fn)
    assert probe.found == [(model, "up"), (model, "down")]


def test_filters_of_ours_work_with_configs_of_torchao():
    model = build()
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False), LayerFilter(lambda _, name: name == "up"))
    assert type(model.up.weight.data).__name__ == "Int8Tensor"
    assert type(model.down.weight.data) is torch.Tensor


@pytest.mark.parametrize("config", [Probe(), TimestepInt8Config(), PlanConfig(denoiser_plan(build()))])
@pytest.mark.parametrize("before", [False, True])
def test_torchaos_own_filter_is_told_which_line_to_change(config, before):
    model = build()
    if before:  # what an earlier call has learned about this very denoiser is not used
        quantize_(model, Probe(), linear_and_conv2d)
    with pytest.raises(DQError, match=LINE_TO_CHANGE):
        quantize_(model, config)
    assert context_of(model) is None
    with pytest.raises(DQError, match=LINE_TO_CHANGE):
        quantize_(model, FqnToConfig({"up": config}), filter_fn=None)


def test_a_note_serves_one_call_of_a_handler():
    model = build()
    quantize_(model, Probe(), LayerFilter(lambda _, name: name == "conv_out"))
    with pytest.raises(DQError, match=LINE_TO_CHANGE):
        quantize_(model, Probe(), lambda _, name: name == "conv_out")


def test_a_part_of_the_denoiser_is_not_taken_for_the_denoiser_of_an_earlier_call():
    whole, probe = nn.ModuleDict({"a": build()}), Probe()
    quantize_(whole, Probe(), linear_and_conv2d)
    with pytest.raises(DQError, match=LINE_TO_CHANGE):  # this filter never sees the root of its own call
        quantize_(whole["a"], probe, lambda module, name: name != "" and linear_and_conv2d(module, name))
    quantize_(whole["a"], probe, linear_and_conv2d)
    assert probe.found[0][0] is whole["a"]


def test_quantize_within_quantize():
    outer, inner, other = build(), build(), Probe()

    def nested(name: str) -> None:
        if name == "up":
            quantize_(inner, other, linear_and_conv2d)

    probe = Probe(nested)
    with pytest.raises(DQError, match=LINE_TO_CHANGE):  # rather the error than the other denoiser
        quantize_(outer, probe, linear_and_conv2d)
    assert {id(denoiser) for denoiser, _ in probe.found} == {id(outer)}
    assert {id(denoiser) for denoiser, _ in other.found} == {id(inner)}


def test_an_exception_midway_leaves_nothing_behind():
    first, second, probe = build(), build(), Probe()

    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_(first, Probe(interrupt), linear_and_conv2d)
    quantize_(second, probe, linear_and_conv2d)
    assert all(denoiser is second for denoiser, _ in probe.found)


def test_two_threads_at_once():
    barrier, models, found = threading.Barrier(2, timeout=20), [build(), build()], {}

    def run(index: int) -> None:
        probe = Probe(lambda name: barrier.wait() and None)  # both are always at the same layer
        quantize_(models[index], probe, linear_and_conv2d)
        found[index] = probe

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, model in enumerate(models):
        assert found[index].found == [(model, name) for name in ALL]


def test_a_denoiser_that_was_quantized_can_be_freed():
    model = build()
    quantize_(model, TimestepInt8Config(), linear_and_conv2d)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_one_call_of_the_handler_changes_one_layer():
    model, states = build(), []

    def select(module: nn.Module, name: str) -> bool:
        report = {n: type(m).__name__ for n, m in model.named_modules() if n in ALL}
        states.append([n for n, kind in report.items() if kind.startswith("Integer")])
        return linear_and_conv2d.selects(module, name)

    plan = denoiser_plan(build())
    quantize_(model, PlanConfig(plan), LayerFilter(select))
    grown = [len(each) for each in states]
    assert grown == sorted(grown)
    assert all(b - a <= 1 for a, b in itertools.pairwise(grown))
    assert grown[-1] >= 3


def test_layers_can_be_prepared_without_quantize():
    model = build()
    prepare(model, [model.up], TimestepInt8Config())
    assert list(context_of(model).hooks) == ["up"]
