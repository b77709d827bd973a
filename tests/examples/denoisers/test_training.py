from __future__ import annotations

import argparse
import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from training import (
    Settings,
    add_arguments,
    diffusion_loss,
    draw_timesteps,
    drop_condition,
    learning_rate_at,
    save_grid,
    settings_from,
    train,
)


def tiny_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))


def loss_on(model: nn.Module):
    return lambda rng: nn.functional.mse_loss(model(torch.randn(8, 4, generator=rng)), torch.ones(8, 4))


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(out=tmp_path / "run", steps=7, batch_size=8, learning_rate=1e-2, warmup=2, checkpoint_every=100)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(settings, tmp_path):
    whole, part, rest = tiny_model(), tiny_model(), tiny_model()
    expected = train(whole, loss_on(whole), replace(settings, out=tmp_path / "whole"))
    assert train(part, loss_on(part), settings, stop_at=3).steps == 3
    nn.init.zeros_(rest[0].weight)  # everything must come from the checkpoint
    result = train(rest, loss_on(rest), replace(settings, resume=True))
    assert (result.steps, result.loss) == (expected.steps, expected.loss)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))
    one, two = (load_file(folder / "training.ckpt.safetensors") for folder in (tmp_path / "whole", settings.out))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_resume_a_checkpoint_is_ignored(settings):
    first, second = tiny_model(), tiny_model()
    train(first, loss_on(first), settings)
    train(second, loss_on(second), settings)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_seed_decides_the_run(settings, tmp_path):
    first, second = tiny_model(), tiny_model()
    train(first, loss_on(first), settings)
    train(second, loss_on(second), replace(settings, seed=1, out=tmp_path / "other"))
    assert not torch.equal(first[0].weight, second[0].weight)


def test_training_lowers_the_loss_and_leaves_the_average(settings):
    model = tiny_model()
    before = loss_on(model)(torch.Generator().manual_seed(9)).item()
    train(model, loss_on(model), replace(settings, steps=60))
    assert loss_on(model)(torch.Generator().manual_seed(9)).item() < 0.5 * before
    state = load_file(settings.checkpoint)
    assert torch.equal(model[0].weight, state["ema.0.weight"])
    assert not torch.equal(model[0].weight, state["model.0.weight"])


def test_timesteps_are_uniform_and_cover_the_schedule():
    rng = torch.Generator().manual_seed(0)
    t = torch.stack([draw_timesteps(10, 1000, rng) for _ in range(200)])
    assert t.min() >= 0
    assert t.max() <= 999
    assert torch.equal(t.div(100, rounding_mode="floor").sort(dim=1).values, torch.arange(10).expand(200, 10))


def test_conditions_are_dropped_row_by_row_at_the_given_rate():
    condition = torch.arange(1, 20001).view(-1, 2)
    null = torch.tensor([0, -1])
    dropped = drop_condition(condition, null, torch.Generator().manual_seed(0), probability=0.1)
    rows = (dropped == null).all(dim=1)
    assert rows.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(dropped[~rows], condition[~rows])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_vanishes_for_the_true_target(kind):
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    images = torch.rand(4, 1, 2, 2) * 2 - 1

    def oracle(x, t):
        abar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        noise = (x - abar.sqrt() * images) / (1 - abar).sqrt()
        return noise if kind == "epsilon" else abar.sqrt() * noise - (1 - abar).sqrt() * images

    rng = torch.Generator().manual_seed(0)
    assert diffusion_loss(oracle, images, scheduler, rng).item() < 1e-6
    assert diffusion_loss(lambda x, t: torch.zeros_like(x), images, scheduler, rng).item() > 0.1


def test_the_learning_rate_rises_then_falls(settings):
    rates = [learning_rate_at(step, replace(settings, steps=100, warmup=10)) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-2)
    assert rates.index(max(rates)) in (9, 10)
    assert all(math.isfinite(rate) for rate in rates)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


def test_the_command_line_fills_the_settings(settings):
    parser = argparse.ArgumentParser()
    add_arguments(parser, settings)
    assert settings_from(parser.parse_args([]), settings) == settings
    given = settings_from(parser.parse_args(["--steps", "3", "--bf16", "--resume", "--out", "there"]), settings)
    assert (given.steps, given.bf16, given.resume, str(given.out)) == (3, True, True, "there")


def test_a_grid_shows_every_image(tmp_path):
    images = [Image.new("L", (2, 2), shade) for shade in (10, 20, 30)]
    save_grid(images, tmp_path / "grid.png", columns=2, scale=3, gap=1)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (15, 15)
    assert [grid.getpixel(place) for place in ((1, 1), (8, 6), (1, 8))] == [10, 20, 30]
