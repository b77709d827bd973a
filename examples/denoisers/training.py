"""What both training scripts share: the diffusion loss, the training loop with EMA, checkpoints, and the command line.

Shapes: images ``x`` are ``[B, C, H, W]`` in [-1, 1], timesteps ``t`` are int64 ``[B]``, losses are 0-d.

    x_t    = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps          DDPM, arXiv 2006.11239, eq. 4
    v_t    = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0          v-prediction, arXiv 2202.00512, appendix D
    ema   <- d ema + (1 - d) theta

All randomness comes from one CPU generator whose state is in the checkpoint, so a run that was interrupted and resumed
takes the same path, bit for bit, as one that was not.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import SchedulerMixin
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from dq_plugins.passes.binarization import moving_average

Loss = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class Settings:
    """How one run trains.

    Attributes:
        out: folder that receives the checkpoint while training, and the finished pipeline.
        steps: optimizer steps of the whole run; the learning rate's cosine ends here.
        batch_size: images a step.
        learning_rate: peak of the learning rate, after ``warmup`` steps.
        ema_decay: ceiling of the EMA's decay; the first steps use a smaller one.
        seed: of weights, batches, noise and dropped conditions.
        device: ``cpu`` or ``cuda``.
        bf16: run the forward pass in bfloat16 autocast (weights and their updates stay float32).
        checkpoint_every: steps between two checkpoints.
        resume: go on from the checkpoint in ``out``.
        warmup: steps over which the learning rate rises.
    """

    out: Path
    steps: int
    batch_size: int
    learning_rate: float
    ema_decay: float = 0.999
    seed: int = 0
    device: str = "cpu"
    bf16: bool = False
    checkpoint_every: int = 250
    resume: bool = False
    warmup: int = 100

    @property
    def checkpoint(self) -> Path:
        """Where the state of an unfinished run lies."""
        return self.out / "training.ckpt.safetensors"


@dataclass(frozen=True)
class Result:
    """What a run cost and reached: steps done, wall seconds over all its parts, and the smoothed loss at its end."""

    steps: int
    seconds: float
    loss: float


def add_arguments(parser: argparse.ArgumentParser, defaults: Settings) -> None:
    """Give ``parser`` the options of `Settings`, with ``defaults`` as the recipe of the published weights."""
    parser.add_argument("--out", type=Path, default=defaults.out, help="folder for checkpoints and the pipeline")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=defaults.device)
    parser.add_argument("--bf16", action="store_true", help="forward pass in bfloat16 autocast")
    parser.add_argument("--checkpoint-every", type=int, default=defaults.checkpoint_every)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")


def settings_from(arguments: argparse.Namespace, defaults: Settings) -> Settings:
    """The `Settings` that parsed ``arguments`` ask for."""
    names = ("out", "steps", "batch_size", "learning_rate", "seed", "device", "bf16", "checkpoint_every", "resume")
    return replace(defaults, **{name: getattr(arguments, name) for name in names})


def draw_timesteps(batch: int, total: int, rng: torch.Generator) -> Tensor:
    """Timesteps ``[batch]`` spread evenly over ``0 .. total - 1`` from one random offset.

    Each is uniform by itself, and the batch covers the schedule, which lowers the variance of the loss
    (arXiv 2107.00630, section I.1).
    """
    offset = torch.rand((), generator=rng)
    return (((offset + torch.arange(batch) / batch) % 1.0) * total).long().clamp_(max=total - 1)


def diffusion_loss(
    denoise: Callable[[Tensor, Tensor], Tensor], images: Tensor, scheduler: SchedulerMixin, rng: torch.Generator
) -> Tensor:
    """Mean squared error of a denoiser against the target that ``scheduler.config.prediction_type`` names.

    Args:
        denoise: ``(x_t [B, C, H, W], t [B]) -> [B, C, H, W]``.
        images: ``x_0 [B, C, H, W]`` in [-1, 1], on the device that trains.
        scheduler: gives the noise levels.
        rng: CPU generator of timesteps and noise.
    """
    t = draw_timesteps(len(images), scheduler.config.num_train_timesteps, rng).to(images.device)
    noise = torch.randn(images.shape, generator=rng).to(images.device)
    target = noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(images, noise, t)
    return nn.functional.mse_loss(denoise(scheduler.add_noise(images, noise, t), t).float(), target)


def drop_condition(condition: Tensor, null: Tensor, rng: torch.Generator, probability: float = 0.1) -> Tensor:
    """Replace each row of ``condition [B, ...]`` by ``null [...]`` with ``probability``.

    This is what makes classifier-free guidance possible (arXiv 2207.12598, algorithm 1).
    """
    dropped = torch.rand(len(condition), generator=rng) < probability
    return torch.where(dropped.view(-1, *[1] * null.ndim), null, condition)


@dataclass
class State:
    """Everything a run needs to go on: weights, their average, optimizer, generator, and how far it came."""

    model: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.AdamW
    rng: torch.Generator
    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan

    def save(self, path: Path) -> None:
        """Write to ``path``, whole or not at all: an interruption leaves the earlier checkpoint as it was."""
        tensors = {"rng": self.rng.get_state()}
        for (name, parameter), average in zip(self.model.named_parameters(), self.ema.module.parameters(), strict=True):
            tensors[f"model.{name}"] = parameter.detach().contiguous()
            tensors[f"ema.{name}"] = average.detach().contiguous()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value.contiguous()
        progress = {"step": str(self.step), "seconds": repr(self.seconds), "loss": repr(self.loss)}
        partial = path.with_suffix(".tmp")
        save_file(tensors, partial, metadata=progress)
        partial.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Take up what `save` wrote to ``path``."""
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            self.rng.set_state(file.get_tensor("rng"))
            for (name, parameter), average in zip(
                self.model.named_parameters(), self.ema.module.parameters(), strict=True
            ):
                parameter.copy_(file.get_tensor(f"model.{name}"))
                average.copy_(file.get_tensor(f"ema.{name}"))
                keys = [n.split(".")[1] for n in names if n.startswith("optimizer.") and n.split(".", 2)[2] == name]
                self.optimizer.state[parameter] = {
                    key: file.get_tensor(f"optimizer.{key}.{name}").to(parameter.device) for key in keys
                }
            progress = file.metadata()
        self.step, self.seconds, self.loss = (
            int(progress["step"]),
            float(progress["seconds"]),
            float(progress["loss"]),
        )
        self.ema.n_averaged.fill_(self.step)


def learning_rate_at(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (0.05 + 0.475 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(model: nn.Module, loss_of: Loss, settings: Settings, stop_at: int | None = None) -> Result:
    """Train ``model`` in place and leave its EMA weights in it.

    Args:
        model: holds every parameter that ``loss_of`` depends on.
        loss_of: draws one batch from the generator it is given and returns the loss.
        settings: the run; with ``resume`` its checkpoint is taken up, where there is one.
        stop_at: end after this many steps as an interruption would, checkpoint written.

    Returns:
        Steps done, seconds spent (those before an interruption included) and the smoothed loss.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.0, fused=True)
    rng = torch.Generator().manual_seed(settings.seed)
    state = State(model, moving_average(model, settings.ema_decay), optimizer, rng)
    if settings.resume and settings.checkpoint.exists():
        state.load(settings.checkpoint)
    last = settings.steps if stop_at is None else stop_at
    began = time.perf_counter() - state.seconds
    model.train()
    with tqdm(total=settings.steps, initial=state.step, desc="training", unit="step") as bar:
        while state.step < last:
            _step(state, loss_of, settings)
            state.seconds = time.perf_counter() - began
            bar.update()
            bar.set_postfix(loss=f"{state.loss:.4f}")
            if state.step % settings.checkpoint_every == 0 or state.step == last:
                state.save(settings.checkpoint)
    model.load_state_dict(state.ema.module.state_dict())
    model.eval()
    print(f"{state.step} steps, {state.seconds:.0f} s, loss {state.loss:.4f}")
    return Result(state.step, state.seconds, state.loss)


def _step(state: State, loss_of: Loss, settings: Settings) -> None:
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate_at(state.step, settings)
    with torch.autocast(settings.device, torch.bfloat16, enabled=settings.bf16):
        loss = loss_of(state.rng)
    loss.backward()
    nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    value = loss.item()
    state.loss = value if math.isnan(state.loss) else 0.99 * state.loss + 0.01 * value
    state.ema.update_parameters(state.model)


def set_determinism(seed: int) -> None:
    """Seed the weights and keep float32 products in float32 on every device."""
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_flush_denormal(True)  # EMA and Adam moments of unused weights decay into denormals, which are slow


def save_grid(images: Sequence[Image.Image], path: Path, columns: int, scale: int = 2, gap: int = 4) -> None:
    """Write ``images``, all of one size, as one picture of ``columns`` columns, each enlarged ``scale`` times."""
    width, height = (side * scale + gap for side in images[0].size)
    sheet = Image.new(images[0].mode, (columns * width + gap, -(-len(images) // columns) * height + gap), "gray")
    for index, image in enumerate(images):
        place = (index % columns * width + gap, index // columns * height + gap)
        sheet.paste(image.resize((width - gap, height - gap), Image.Resampling.NEAREST), place)
    sheet.save(path)
