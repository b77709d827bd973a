"""BinaryDM at equal iterations: vanilla binarizer, evolvable bases (EBB), and EBB with mimicking (EBB+LRM).

    python benchmarks/binarydm.py --device cuda --steps 3000 --out results/binarydm

One command trains the full-precision teacher, then every variant from it for several seeds, ``--jobs`` runs at a time,
and writes ``results.json``, ``results.md``, ``curves.png`` and ``samples.png``. Finished runs are kept: the same
command goes on where it was stopped. Needs numpy, scikit-learn, matplotlib, networkx, pydantic, safetensors and tqdm
beside torch; neither diffusers nor brevitas.

Reported for each run: the diffusion loss on held-out noise and timesteps with raw and with averaged weights, the
Frechet distance of samples (averaged weights) to the training images in the features of a classifier, the loss jump at
the transition, and the mean second scale relative to its start. Everything is fake quantization, except the sizes.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from binarydm_report import write_report
from binarydm_task import TIMESTEPS, Diffusion, FeatureNet, UNet, frechet_distance, load_images, train_feature_net
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import dq_plugins.graph as graph
from dq_plugins.binarization import (
    BinaryDMCallback,
    BinaryDMChoices,
    binarydm_choices,
    operations,
    second_scale_mean,
    total_size,
    train_quantized,
    weight_sizes,
)

EVALUATION_SEED = 10**9
CURVE_EVERY = 50


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Attributes:
        name: in the report.
        bases: 1 (vanilla) or 2 (EBB).
        tau: weight of the regulariser.
        mimic: lambda of the mimicking loss; 0: none.
        scale_gradient: of the first scale, see `EvolvableBasis`.
        evolve: share of all iterations after which the second bases are dropped.
        fade: share of the iterations before that over which they fade out; 0: they do not.
    """

    name: str
    bases: int = 2
    tau: float = 9e-2
    mimic: float = 0.0
    scale_gradient: str = "autograd"
    evolve: float = 0.5
    fade: float = 0.0


VARIANTS = (
    Variant("vanilla", bases=1, tau=0.0),
    Variant("EBB"),
    Variant("EBB+LRM", mimic=1e-4),
    Variant("EBB+LRM strong", mimic=1e-2),
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
    channels = load_images(settings.data, "cpu").shape[0]
    return UNet(channels, settings.width, settings.multipliers).to(settings.device)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
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
    for group in optimizer.param_groups:
        group["lr"] = value


def train_teacher(settings: Settings) -> UNet:
    """The full-precision denoiser; kept in the output folder."""
    path = Path(settings.out) / "teacher.safetensors"
    torch.manual_seed(0)
    model = build(settings)
    if path.exists():
        model.load_state_dict(load_file(path, settings.device))
        return model.eval().requires_grad_(False)
    images, diffusion = load_images(settings.data, settings.device), Diffusion(settings.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    from dq_plugins.binarization import MovingAverage

    average = MovingAverage(model, 0.999)
    for step in tqdm(range(settings.teacher_steps), desc="teacher"):
        set_rate(optimizer, rate(step, settings.teacher_steps, 1e-3))
        optimizer.zero_grad()
        loss_of(model, diffusion.batch(images.pixels, settings.batch, step)).backward()
        optimizer.step()
        average.update(model)
    with average.applied(model):
        save_file({k: v.clone() for k, v in model.state_dict().items()}, path)
    return train_teacher(settings)


def choices_for(model: UNet, images: Tensor, act_bits: int | None) -> tuple[graph.Partition, BinaryDMChoices]:
    """The paper's choice of layers, from the traced graph."""
    inputs = {"sample": images[:2].cpu(), "timestep": torch.tensor([1, 2])}
    part = graph.partition(copy.deepcopy(model).cpu(), inputs)
    return part, binarydm_choices(part, act_bits)


def train_student(
    settings: Settings, variant: Variant, act_bits: int, seed: int, progress: bool
) -> tuple[nn.Module, BinaryDMCallback, dict]:
    """One run of quantization-aware training; returns the model, its callback and what was measured on the way."""
    teacher, images = train_teacher(settings), load_images(settings.data, settings.device).pixels
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


def run(settings: Settings, variant: Variant, act_bits: int, seed: int, progress: bool = False) -> None:
    """Train, measure, and write one run's JSON and samples."""
    name = f"{variant.name}-A{act_bits}-{seed}".replace(" ", "-").replace("+", "-")
    path = Path(settings.out) / f"{name}.json"
    if path.exists():
        return
    began = time.perf_counter()
    model, callback, measured = train_student(settings, variant, act_bits, seed, progress)
    seconds = time.perf_counter() - began
    images, diffusion = load_images(settings.data, settings.device), Diffusion(settings.device)
    model.eval()
    measured["loss"] = evaluate(model, diffusion, images.pixels)
    with callback.averaged():
        measured["ema_loss"] = evaluate(model, diffusion, images.pixels)
        samples = generate(model, diffusion, settings, images.shape)
    features = feature_net(settings)
    measured["feature_distance"] = frechet_distance(features.body(samples), features.body(images.pixels))
    reference = load_file(Path(settings.out) / "teacher-samples.safetensors", settings.device)["samples"]
    measured["sample_mse"] = float((samples - reference).square().mean())
    save_file({"samples": samples[:64].cpu().contiguous()}, path.with_suffix(".safetensors"))
    record = {"variant": asdict(variant), "act_bits": act_bits, "seed": seed, "seconds": seconds, **measured}
    path.write_text(json.dumps(record) + "\n")


def generate(model: nn.Module, diffusion: Diffusion, settings: Settings, shape: tuple[int, ...]) -> Tensor:
    """Samples from one fixed set of noise, in chunks."""
    chunks = [
        diffusion.sample(model, (min(256, settings.samples - i), *shape), settings.sample_steps, i)
        for i in range(0, settings.samples, 256)
    ]
    return torch.cat(chunks)


def feature_net(settings: Settings) -> FeatureNet:
    images = load_images(settings.data, settings.device)
    path = Path(settings.out) / "features.safetensors"
    if not path.exists():
        net = train_feature_net(images)
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    net = FeatureNet(images.shape[0], int(images.classes.max()) + 1).to(settings.device)
    net.load_state_dict(load_file(path, settings.device))
    return net.eval().requires_grad_(False)


def prepare(settings: Settings, act_bits: list[int]) -> None:
    """What all runs share: teacher, its samples, the feature network; and the figures that need no training."""
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    teacher, images = train_teacher(settings), load_images(settings.data, settings.device)
    diffusion, features = Diffusion(settings.device), feature_net(settings)
    samples = generate(teacher, diffusion, settings, images.shape)
    save_file({"samples": samples.contiguous()}, out / "teacher-samples.safetensors")
    record = {
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in teacher.parameters()),
        "loss": evaluate(teacher, diffusion, images.pixels),
        "feature_distance": frechet_distance(features.body(samples), features.body(images.pixels)),
        "timesteps": TIMESTEPS,
    }
    for bits in act_bits:
        part, choices = choices_for(teacher, images.pixels, bits)
        vanilla = train_quantized(copy.deepcopy(teacher), choices.with_vanilla_binarizer().layers)
        binary = total_size(weight_sizes(vanilla, binary_only=True))
        record[f"A{bits}"] = {
            "binary_part_ratio": binary.ratio,
            "binary_part_bytes": binary.stored,
            "all_layers_ratio": total_size(weight_sizes(vanilla)).ratio,
            "operations_ratio": operations(part, choices.layers).ratio,
            "evolvable_blocks": choices.evolvable_blocks,
        }
    (out / "teacher.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, digits8, or an .npz with images [N, H, W, 3]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="binarydm-results")
    parser.add_argument("--steps", type=int, default=3000, help="iterations of every quantized run")
    parser.add_argument("--teacher-steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--multipliers", type=int, nargs="+", default=[1, 2, 4], help="of the width, one a level")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--sample-steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--act-bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--variants", nargs="+", default=[v.name for v in VARIANTS], choices=[v.name for v in VARIANTS])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; several share one device well")
    arguments = vars(parser.parse_args())
    seeds, bits, names, jobs = (arguments.pop(k) for k in ("seeds", "act_bits", "variants", "jobs"))
    settings = Settings(**arguments | {"multipliers": tuple(arguments["multipliers"])})
    torch.set_float32_matmul_precision("high")
    prepare(settings, bits)
    runs = [(settings, v, b, s) for s in range(seeds) for b in bits for v in VARIANTS if v.name in names]
    if jobs == 1:
        for one in runs:
            run(*one, progress=True)
    else:
        with torch.multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=4) as pool:
            for _ in tqdm(pool.imap_unordered(_run, runs), total=len(runs), desc="runs"):
                pass
    write_report(Path(settings.out))


def _run(arguments: tuple) -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    run(*arguments)


if __name__ == "__main__":
    main()
