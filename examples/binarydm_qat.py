"""Train a pixel-space text-to-image U-Net to one bit a weight, with activations of 8 or 4 bits.

    python examples/binarydm_qat.py --act-bits 8 --out w1a8
    python examples/binarydm_qat.py --act-bits 4 --out w1a4 --resume
    accelerate launch --num_processes 2 examples/binarydm_qat.py --act-bits 8 --out w1a8

Nothing is downloaded: the images to train on are drawn by the full-precision pipeline itself, from the prompts it was
trained with. The loop is an ordinary one; the lines that BinaryDM adds to it end in "# BinaryDM". At the end the folder
holds ``plan`` (what was learned, for any backend), ``integer`` (the U-Net in torchao's integer layers, 8 weights to a
byte), ``report.json``, and ``samples.png``: rows of the full-precision model, of the simulated binary one and of the
integer one.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from pathlib import Path

import dq_torchao
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import dq_plugins as dq
from dq_plugins.artifact import Format, StoredTensor
from dq_plugins.atomic import replacing, write_atomically
from dq_plugins.passes.binarization import (
    BinaryDMCallback,
    binarydm_choices,
    load_checkpoint,
    save_checkpoint,
    to_plan,
    train_quantized,
    weight_size,
)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "denoisers"))
from training import diffusion_loss  # noqa: E402  the loss the bundled denoisers were trained with

TEXT_LENGTH, TEXT_WIDTH = 4, 16
IMAGES: Format[dict[str, Tensor]] = Format("training-images", 1, dict[str, StoredTensor], what="training images")


class TinyPipeline:
    """An untrained stand-in with the parts of a pipeline that this script uses; for trying the script out."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=8,
            norm_num_groups=4,
        )
        self.scheduler = DDIMScheduler()

    def to(self, device: torch.device) -> TinyPipeline:
        self.unet.to(device)
        return self

    def encode_prompt(self, prompts: list[str]) -> Tensor:
        rows = [torch.Generator().manual_seed(sum(map(ord, p))) for p in prompts]
        states = [torch.randn(TEXT_LENGTH, TEXT_WIDTH, generator=g) for g in rows]
        return torch.stack(states).to(self.unet.device)

    @torch.no_grad()
    def __call__(self, prompt: list[str], num_inference_steps: int = 5, generator: torch.Generator | None = None, **_):
        x = torch.randn(len(prompt), 3, 8, 8, generator=generator).to(self.unet.device)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noise = self.unet(x, t, encoder_hidden_states=self.encode_prompt(prompt), return_dict=False)[0]
            x = self.scheduler.step(noise, t, x, return_dict=False)[0]
        return ((x / 2 + 0.5).clamp(0, 1),)


def load_pipeline(name: str):
    """The pipeline of a folder, in float32, or the untrained stand-in."""
    if name == "tiny":
        return TinyPipeline()
    from dq_diffusers.pipelines import PixelTextToImagePipeline

    pipeline = PixelTextToImagePipeline.from_pretrained(name, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompts_of(name: str) -> list[str]:
    """The prompts a pipeline was trained with: ``prompts.txt`` in its folder, one a line."""
    file = Path(name) / "prompts.txt"
    return file.read_text().splitlines() if file.exists() else [f"prompt {i}" for i in range(8)]


def draw(pipeline, prompts: list[str], steps: int, seed: int) -> Tensor:
    """Images ``[len(prompts), C, H, W]`` in [-1, 1], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    batches = [prompts[i : i + 32] for i in range(0, len(prompts), 32)]
    images = [
        pipeline(b, num_inference_steps=steps, generator=generator, output_type="pt", return_dict=False)
        for b in batches
    ]
    return torch.cat([batch[0] for batch in images]) * 2 - 1


def training_images(pipeline, arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Images the full-precision pipeline draws, and the text states they were drawn from; kept in the folder."""
    path = arguments.out / "training-images.safetensors"
    known = prompts_of(arguments.pipeline)
    prompts = (known * math.ceil(arguments.images / len(known)))[: arguments.images]
    settings = {"pipeline": arguments.pipeline, "images": arguments.images, "steps": arguments.sample_steps}
    kept = IMAGES.find(path, settings)
    images = kept["images"] if kept else draw(pipeline, prompts, arguments.sample_steps, seed=1)
    if kept is None:
        IMAGES.write(path, {"images": images}, settings)
    in_channels = pipeline.unet.config.in_channels
    if images.shape[1] != in_channels:  # the U-Net sees k x k pixels as one position
        images = torch.nn.functional.pixel_unshuffle(images, math.isqrt(in_channels // images.shape[1]))
    return images, pipeline.encode_prompt(prompts).detach().cpu()


def example_inputs(unet: nn.Module, states: Tensor) -> dict[str, Tensor]:
    """Arguments of one call, for tracing."""
    size = unet.config.sample_size
    sample = torch.randn(2, unet.config.in_channels, size, size)
    return {"sample": sample, "timestep": torch.tensor([1, 2]), "encoder_hidden_states": states[:2]}


def draw_batch(images: Tensor, states: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Images and text states of one iteration, and the generator for the rest of its random numbers.

    It belongs to the iteration alone, so that a resumed run goes on the same way.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(images), (size,), generator=generator)
    return images[rows], states[rows], generator


def set_rate(optimizer: torch.optim.Optimizer, step: int, arguments: argparse.Namespace) -> None:
    """Learning rate of an iteration: warm-up over 50, then linear decay to a twentieth."""
    for group in optimizer.param_groups:
        group["lr"] = arguments.learning_rate * min(1, (step + 1) / 50) * (1 - 0.95 * step / arguments.steps)


def train(arguments: argparse.Namespace) -> None:
    """Binarize a copy of the pipeline's U-Net, train it against the original, and write what came out."""
    accelerator = Accelerator(cpu=arguments.device == "cpu")
    device = accelerator.device
    pipeline = load_pipeline(arguments.pipeline).to(device)
    teacher = pipeline.unet
    with accelerator.main_process_first():
        images, states = training_images(pipeline, arguments)
    part = dq.partition(copy.deepcopy(teacher).cpu(), example_inputs(teacher, states))
    choices = binarydm_choices(part, arguments.act_bits)

    torch.manual_seed(arguments.seed)
    student = train_quantized(copy.deepcopy(teacher), choices.layers)  # BinaryDM
    student.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=arguments.learning_rate, weight_decay=0.0, fused=True)
    evolve_at = max(1, arguments.steps // 4)
    binarydm = BinaryDMCallback(  # BinaryDM
        student,
        teacher,
        blocks=choices.blocks,
        evolve_at=evolve_at,
        fade=evolve_at,  # far too few iterations for the regulariser alone
        mimic=arguments.mimic,
        ema_decay=0.995,
    )
    checkpoint, start = arguments.out / "checkpoint.safetensors", 0
    if arguments.resume and checkpoint.exists():
        start, _ = load_checkpoint(checkpoint, student, optimizer, binarydm)
    model, optimizer = accelerator.prepare(student, optimizer)

    is_main, total = accelerator.is_main_process, arguments.steps
    bar = tqdm(range(start, total), initial=start, total=total, disable=not is_main)
    for step in bar:
        seed = arguments.seed * 10**6 + step * accelerator.num_processes + accelerator.process_index
        x0, condition, generator = draw_batch(images, states, arguments.batch, seed)

        def denoise(x: Tensor, t: Tensor, condition: Tensor = condition) -> Tensor:
            return model(x, t, encoder_hidden_states=condition.to(device), return_dict=False)[0]

        set_rate(optimizer, step, arguments)
        loss = diffusion_loss(denoise, x0.to(device), pipeline.scheduler, generator)
        accelerator.backward(binarydm.step(loss))  # BinaryDM: was accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        binarydm.on_step(step)  # BinaryDM
        bar.set_postfix(loss=f"{loss.item():.4f}", bases=1 if binarydm.evolved else 2)
        if is_main and ((step + 1) % arguments.save_every == 0 or step + 1 == total):
            save_checkpoint(checkpoint, step + 1, student, optimizer, binarydm)
    if is_main:
        finished = binarydm.averaged.eval()
        binarydm.remove()
        finish(arguments, pipeline, finished)


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels between images in [-1, 1]."""
    return float(10 * torch.log10(4 / (a - b).square().mean().clamp_min(1e-12)))


def finish(arguments: argparse.Namespace, pipeline, student: nn.Module) -> None:
    """Samples, the plan, integer weights, and what they save."""
    out, steps, known = arguments.out, arguments.sample_steps, prompts_of(arguments.pipeline)
    prompts = known[:: max(1, len(known) // 8)][:8]
    original = draw(pipeline, prompts, steps, seed=2)

    def sample(unet: nn.Module) -> None:
        draw(pipeline, prompts[:2], steps, seed=3)

    calibration = dq.record(pipeline.unet, sample, out / "calibration", overwrite=True, progress=False)
    plan = dq.make_plan(
        pipeline.unet, calibration, recipe="binarydm", act_bits=arguments.act_bits, progress=False
    )  # every layer, and the timesteps
    pipeline.unet = student
    simulated = draw(pipeline, prompts, steps, seed=2)
    binary, everything = weight_size(student, binary_only=True), weight_size(student)
    plan = to_plan(student, plan)  # what was learned goes into the plan; the student is an ordinary U-Net again
    plan.save(out / "plan")
    pipeline.unet = dq.apply(student, plan, backend="torchao")
    integer = draw(pipeline, prompts, steps, seed=2)
    dq_torchao.save(pipeline.unet, out / "integer")
    strips = [torch.cat(list(images.cpu()), dim=2) for images in (original, simulated, integer)]
    grid = ((torch.cat(strips, dim=1) / 2 + 0.5).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    with replacing(out / "samples.png") as temporary:
        Image.fromarray(np.repeat(np.repeat(grid, 3, 0), 3, 1)).save(temporary)
    execution = dq_torchao.execution_report(pipeline.unet)
    report = {
        "act_bits": arguments.act_bits,
        "steps": arguments.steps,
        "binary_weights_smaller": binary.ratio,
        "all_quantized_weights_smaller": everything.ratio,
        "layers_in_integers": sum(layer.state == "integer" for layer in execution.values()),
        "layers": len(execution),
        "file_bytes": (out / "integer" / "model.safetensors").stat().st_size,
        "psnr_simulated_to_full_precision": psnr(simulated, original),
        "psnr_integer_to_simulated": psnr(integer, simulated),
    }
    write_atomically(out / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    print(json.dumps(report, indent=1))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=str(HERE / "denoisers" / "emoji"), help="folder, or 'tiny' (untrained)")
    parser.add_argument("--out", type=Path, default=Path("binarydm"))
    parser.add_argument("--act-bits", type=int, default=8, choices=[4, 8])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--mimic", type=float, default=1e-4, help="lambda of the mimicking loss")
    parser.add_argument("--images", type=int, default=512, help="how many training images the pipeline draws")
    parser.add_argument("--sample-steps", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--resume", action="store_true")
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
