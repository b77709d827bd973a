from __future__ import annotations

import copy
import pickle

import dq_torchao
import pytest
import torch
from dq_torchao.kernels import prepacked_bytes
from dq_torchao.lowering import lower_layer
from torch import nn
from torch._inductor import config as inductor_config
from torchao_models import GROUPS, TIMESTEPS, Denoiser, denoiser_plan, layer_plan, sqnr

from dq_plugins.errors import DQError
from dq_plugins.timesteps import TimestepContext

SCALAR, PER_SAMPLE = torch.tensor(500.0), torch.tensor([100.0, 800.0])


def run(layer: nn.Module, x: torch.Tensor, timestep: torch.Tensor = SCALAR) -> torch.Tensor:
    with layer.context.select(timestep):
        return layer(x)


def released_layer(layer: nn.Module, x: torch.Tensor, **options: int) -> tuple[nn.Module, nn.Module]:
    """A released integer layer, and the same one as it was."""
    context = TimestepContext({"all": GROUPS})
    lower_layer(layer, layer_plan(layer, **options), context)
    untouched = copy.deepcopy(layer)
    for form in (layer, untouched):
        run(form, x)
    assert layer.release_weight() > 0
    return layer, untouched


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Linear(37, 11), (2, 37)),
        (lambda: nn.Conv2d(6, 10, 3, padding=1, groups=2), (2, 6, 5, 7)),
        (lambda: nn.Conv2d(32, 64, 3), (2, 32, 8, 8)),
        (lambda: nn.Conv2d(16, 16, 3, groups=16), (2, 16, 8, 8)),
    ],
    ids=["linear", "grouped", "blocked", "depthwise"],
)
def test_released_layers_compute_and_save_the_same(build, shape, bits):
    torch.manual_seed(0)
    x = torch.randn(shape)
    layer, untouched = released_layer(build(), x, weight_bits=bits)
    for timestep in (SCALAR, PER_SAMPLE):
        assert torch.equal(run(layer, x, timestep), run(untouched, x, timestep))
    expected = untouched.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in layer.state_dict().items())
    assert torch.equal(layer.weight, untouched.weight)


def test_zero_points_survive():
    torch.manual_seed(0)
    layer = nn.Linear(37, 11)
    plan = layer_plan(layer, weight_bits=4)
    plan.weight.zero_point = torch.arange(11, dtype=torch.int32) % 3
    context = TimestepContext({"all": GROUPS})
    lower_layer(layer, plan, context)
    packed = layer.weight_packed.clone()
    with context.select(SCALAR):
        layer(torch.randn(2, 37))
        layer.release_weight()
        assert torch.equal(layer.state_dict()["weight_packed"], packed)


def test_memory_is_that_of_the_kernels_layout():
    layer, _ = released_layer(nn.Linear(256, 128), torch.randn(2, 256))
    held = sum(buffer.nbytes for name, buffer in layer.named_buffers() if "scale" not in name)
    assert held == layer.act_zero_point.nbytes + layer.code_widths.nbytes
    assert 256 * 128 <= prepacked_bytes(layer.weight_packed) < 1.1 * 256 * 128


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_of_released_layers_stand_alone(copied):
    x = torch.randn(2, 37)
    layer, untouched = released_layer(nn.Linear(37, 11), x)
    clone = copied(layer)
    assert not clone.released
    assert torch.equal(run(clone, x), run(untouched, x))
    assert layer.released


def test_released_convolutions_take_images_of_another_size():
    layer, untouched = released_layer(nn.Conv2d(6, 10, 3), torch.randn(1, 6, 8, 8))
    for size in range(5, 12):  # more sizes than layouts are kept
        x = torch.randn(1, 6, size, size)
        assert torch.equal(run(layer, x), run(untouched, x))


def test_new_weights_can_be_loaded_and_casts_keep_the_weight():
    x = torch.randn(2, 37)
    layer, untouched = released_layer(nn.Linear(37, 11), x)
    other, expected = released_layer(nn.Linear(37, 11), x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(run(other, x), run(untouched, x))
    assert not torch.equal(run(other, x), run(expected, x))
    half = [run(form.bfloat16(), x.bfloat16()) for form in (layer, untouched)]
    assert torch.equal(*half)


def test_whole_models_are_released_and_restored():
    torch.manual_seed(0)
    model = Denoiser().eval().requires_grad_(False)
    dq_torchao.apply(model, denoiser_plan(model))
    assert dq_torchao.release_weights(model) == 0  # nothing has run
    batches = [{"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(t)} for t in TIMESTEPS]
    before = [model(**batch) for batch in batches]
    assert dq_torchao.release_weights(model) == 4 * 8 * 9 * 2 + 8 * 32 * 2
    assert dq_torchao.release_weights(model) == 0
    assert all(torch.equal(model(**batch), y) for batch, y in zip(batches, before, strict=True))
    dq_torchao.restore_weights(model)
    assert not any(getattr(module, "released", False) for module in model.modules())
    assert all(torch.equal(model(**batch), y) for batch, y in zip(batches, before, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("freezing", [False, True])
def test_released_models_compile(freezing):
    torch.manual_seed(0)
    model = Denoiser().eval().requires_grad_(False)
    dq_torchao.apply(model, denoiser_plan(model, weight_bits=3))
    batch = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(500.0)}
    y = model(**batch)
    dq_torchao.release_weights(model)
    torch.compiler.reset()
    with inductor_config.patch(freezing=freezing):
        assert sqnr(y, torch.compile(model)(**batch)) > 60


@torch.no_grad()
@pytest.mark.parametrize("freezing", [False, True])
def test_a_compiled_model_is_released_and_its_weights_stay_laid_out_once(freezing):
    torch.manual_seed(0)
    model = Denoiser().eval().requires_grad_(False)
    dq_torchao.apply(model, denoiser_plan(model))
    batch = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(500.0)}
    torch.compiler.reset()
    with inductor_config.patch(freezing=freezing):
        compiled = torch.compile(model)
        y = compiled(**batch)
        held = {name: prepacked_bytes(m.weight_packed) for name, m in model.named_modules() if hasattr(m, "released")}
        assert all(held.values())
        assert dq_torchao.release_weights(model) > 0
        assert torch.equal(compiled(**batch), y)
    assert held == {name: prepacked_bytes(model.get_submodule(name).weight_packed) for name in held}


def test_a_stand_in_that_was_copied_is_refused():
    x = torch.randn(2, 37)
    layer, _ = released_layer(nn.Linear(37, 11), x)
    layer.weight_packed = layer.weight_packed.clone()
    with pytest.raises(DQError, match="restore_weights"):
        run(layer, x)
