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
from dataclasses import asdict
from pathlib import Path

import torch
from binarydm_report import write_report
from binarydm_task import TIMESTEPS, Diffusion, FeatureNet, load_images, train_feature_net
from binarydm_training import VARIANTS, Settings, Variant, choices_for, evaluate, teacher_of, train_student
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from dq_plugins.metrics.set_distance import frechet_distance
from dq_plugins.passes.binarization import operations, train_quantized, weight_size


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
    averaged = callback.averaged.eval()
    measured["ema_loss"] = evaluate(averaged, diffusion, images.pixels)
    samples = generate(averaged, diffusion, settings, images.shape)
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
    """The classifier whose features distances are measured in; trained once and kept in the output folder."""
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
    teacher, images = teacher_of(settings), load_images(settings.data, settings.device)
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
        binary = weight_size(vanilla, binary_only=True)
        record[f"A{bits}"] = {
            "binary_part_ratio": binary.ratio,
            "binary_part_bytes": binary.quantized,
            "all_layers_ratio": weight_size(vanilla).ratio,
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
