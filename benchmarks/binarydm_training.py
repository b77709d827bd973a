"""Training of `binarydm.py`: what is compared, the full-precision teacher, and one run of a variant from it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from binarydm_task import Diffusion, UNet, load_images
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import dq_plugins.graph as graph
from dq_plugins.passes.binarization import (
    BinaryDMCallback,
    BinaryDMChoices,
    binarydm_choices,
    moving_average,
    second_scale_mean,
    train_quantized,
)

EVALUATION_SEED = 10**9
CURVE_EVERY = 50


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Attributes:
        name: in the report.
        bases: 1 (vanilla) or 2 (EBB).
        tau: weight of the regulariser in the loss; None: decoupled, see `shrink`.
        mimic: lambda of the mimicking loss; 0: none.
        scale_gradient: of the first scale, see `EvolvableBasis`.
        evolve: share of all iterations after which the second bases are dropped.
        fade: share of the iterations before that over which they fade out; 0: they do not.
    """

    name: str
    bases: int = 2
    tau: float | None = 9e-2
    mimic: float = 0.0
    scale_gradient: str = "autograd"
    evolve: float = 0.5
    fade: float = 0.0


VARIANTS = (
    Variant("vanilla", bases=1, tau=0.0),
    Variant("EBB"),
    Variant("EBB+LRM", mimic=1e-4),
    Variant("EBB+LRM strong", mimic=1e-2),
    Variant("EBB decoupled", tau=None),
    Variant("EBB decoupled+LRM", tau=None, mimic=1e-4),
    Variant("EBB faded", fade=1.0),
    Variant("EBB early", evolve=0.25, fade=1.0),
    Variant("EBB early+LRM", evolve=0.25, fade=1.0, mimic=1e-4),
    Variant("EBB early+LRM strong", evolve=0.25, fade=1.0, mimic=1e-2),
    Variant("EBB without regulariser", tau=0.0),
    Variant("EBB printed gradient", scale_gradient="printed"),
)


@dataclass(frozen=True)
class Settings:
    """Of the whole benchmark; a run adds its variant, width and seed."""

    data: str
    device: str
    out: str
    steps: int
    teacher_steps: int
    batch: int
    width: int
    learning_rate: float
    samples: int
    sample_steps: int
    multipliers: tuple[int, ...]


def build(settings: Settings) -> UNet:
    """The denoiser with random weights."""
    channels = load_images(settings.data, "cpu").shape[0]
    return UNet(channels, settings.width, settings.multipliers).to(settings.device)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """L_simple (Ho et al. 2020): mean squared error of the predicted noise."""
    x, t, noise = batch
    return (model(x, t) - noise).square().mean()


@torch.no_grad()
def evaluate(model: nn.Module, diffusion: Diffusion, images: Tensor, batches: int = 8) -> float:
    """L_simple on noise and timesteps that no training step draws."""
    seeds = range(EVALUATION_SEED, EVALUATION_SEED + batches)
    return sum(float(loss_of(model, diffusion.batch(images, 256, s))) for s in seeds) / batches


def rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, then linear decay to a twentieth."""
    return peak * min(1.0, (step + 1) / 100) * (1 - 0.95 * step / steps)


def set_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value


def teacher_of(settings: Settings) -> UNet:
    """The full-precision denoiser, frozen; trained once and kept in the output folder."""
    path = Path(settings.out) / "teacher.safetensors"
    if not path.exists():
        _train_teacher(settings, path)
    torch.manual_seed(0)
    model = build(settings)
    model.load_state_dict(load_file(path, settings.device))
    return model.eval().requires_grad_(False)


def _train_teacher(settings: Settings, path: Path) -> None:
    torch.manual_seed(0)
    model = build(settings)
    images, diffusion = load_images(settings.data, settings.device), Diffusion(settings.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    average = moving_average(model, 0.999)
    for step in tqdm(range(settings.teacher_steps), desc="teacher"):
        set_rate(optimizer, rate(step, settings.teacher_steps, 1e-3))
        optimizer.zero_grad()
        loss_of(model, diffusion.batch(images.pixels, settings.batch, step)).backward()
        optimizer.step()
        average.update_parameters(model)
    save_file(average.module.state_dict(), path)


def choices_for(model: UNet, images: Tensor, act_bits: int | None) -> tuple[graph.Partition, BinaryDMChoices]:
    """The paper's choice of layers, from the traced graph."""
    inputs = {"sample": images[:2].cpu(), "timestep": torch.tensor([1, 2])}
    part = graph.partition(copy.deepcopy(model).cpu(), inputs)
    return part, binarydm_choices(part, act_bits)


def train_student(
    settings: Settings, variant: Variant, act_bits: int, seed: int, progress: bool
) -> tuple[nn.Module, BinaryDMCallback, dict]:
    """One run of quantization-aware training; returns the model, its callback and what was measured on the way."""
    teacher, images = teacher_of(settings), load_images(settings.data, settings.device).pixels
    diffusion = Diffusion(settings.device)
    _, choices = choices_for(teacher, images, act_bits)
    torch.manual_seed(seed)
    layers = (choices if variant.bases == 2 else choices.with_vanilla_binarizer()).layers
    model = copy.deepcopy(teacher).requires_grad_(True)
    train_quantized(model, layers, scale_gradient=variant.scale_gradient)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    blocks = choices.blocks if variant.mimic else ()
    evolve_at = round(variant.evolve * settings.steps)
    fade = round(variant.fade * evolve_at) or None
    options = {"tau": variant.tau, "mimic": variant.mimic, "ema_decay": 0.995}
    callback = BinaryDMCallback(model, teacher, blocks=blocks, evolve_at=evolve_at, fade=fade, **options)
    start, curve, jump, second = second_scale_mean(model), [], 0.0, 0.0
    for step in tqdm(range(settings.steps), desc=f"{variant.name} A{act_bits} seed {seed}", disable=not progress):
        set_rate(optimizer, rate(step, settings.steps, settings.learning_rate))
        loss = loss_of(model, diffusion.batch(images, settings.batch, seed * 10**6 + step))
        callback.step(loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = evaluate(model, diffusion, images) if step == evolve_at else 0.0
        second = second_scale_mean(model) / start if start and step == evolve_at else second
        if callback.on_step(step):
            jump = evaluate(model, diffusion, images) - before
        if step % CURVE_EVERY == 0:
            curve.append([step, float(loss.detach())])
    return model, callback, {"curve": curve, "jump": jump, "second_scale": second}
