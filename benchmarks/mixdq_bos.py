"""What exact outlier tokens do: on the bundled text-conditional denoiser as it is, and with an outlier planted.

    python -m benchmarks.mixdq_bos [--factor 80] [--bits 8]

As it is: what the probe finds in the text embeddings of the bundled encoder, and whether the pass changes anything.

Planted: the encoder's first token gets one value ``factor`` times that of the other tokens (which is what CLIP's
encoders have), and the key and value weights that read it are made as much smaller, so that full precision is not
changed by more than what those weights had used it for. Then: error of keys and values of the other tokens, and SQNR
of the denoiser's output, with one range for all tokens and with the outlier computed exactly.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from dq_diffusers.recording import denoiser_of, load_pipeline, sampler
from torch import Tensor, nn

import dq_plugins as dq
from benchmarks.records import Records
from dq_plugins.bundled_denoisers import bundled
from dq_plugins.hooks import hooked
from dq_plugins.metrics import sqnr
from dq_plugins.passes.tokens.bos_tokens import ROLES
from dq_plugins.recipe import Recipe, Step

STEPS = (Step("weight-ranges"), Step("timestep-groups"), Step("activation-ranges"))
PLAIN, EXACT = Recipe("plain", "", STEPS), Recipe("exact", "", (*STEPS, Step("bos-tokens")))
CHANNEL = 0


@contextmanager
def planted(encoder: nn.Module, factor: float) -> Iterator[None]:
    """Add one large value to the first token of every embedding."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        hidden: Tensor = output[0]
        largest = hidden[:, 1:].abs().amax(2).median()
        hidden[:, 0, CHANNEL] = factor * largest
        return output

    with encoder.register_forward_hook(hook):
        yield


def kv_layers(denoiser: nn.Module, calibration: dq.CalibrationSet) -> list[str]:
    """Layers that make the keys and values of cross-attention."""
    part = dq.partition(denoiser, calibration.example_inputs())
    return [name for name, info in part.layers.items() if info.roles & ROLES]


def outputs(model: nn.Module, layers: list[str], calls: dq.CalibrationSet) -> dict[str, Tensor]:
    """Keys and values ``[N, L, O]`` by layer, and the output under ``""``, over all calls."""
    found: dict[str, list[Tensor]] = {name: [] for name in ("", *layers)}

    modules = {name: model.get_submodule(name) for name in layers}
    with hooked(modules, after=lambda name, _, __, y: found[name].append(y.detach())), torch.no_grad():
        for call in calls.calls():
            found[""].append(call.run(model))
    return {name: torch.cat(parts) for name, parts in found.items()}


def compare(denoiser: nn.Module, calibration: dq.CalibrationSet, bits: int) -> dict[str, Any]:
    """Plain ranges against exact tokens, on the recorded calls of some timesteps."""
    figures: dict[str, Any] = {}
    layers = kv_layers(denoiser, calibration)
    calls = calibration.subset(timesteps=calibration.timesteps[::4])
    full = outputs(denoiser, layers, calls)
    for recipe in (PLAIN, EXACT):
        plan = dq.make_plan(denoiser, calibration, recipe, weight_bits=8, act_bits=bits, progress=False)
        section = plan.sections.get("bos-tokens")
        if section is not None:
            best = max(section.data["seen"].values(), key=lambda seen: seen["ratio"])
            state = section.data.get("skipped", f"{len(plan.outlier_rows)} layers with exact tokens")
            figures["probe"] = {k: best[k] for k in ("position", "ratio", "share")} | {"state": state}
            print(f"  probe: {figures['probe']}")
        found = outputs(dq.apply(denoiser, plan, "simulate"), layers, calls)
        others = [sqnr(full[name][:, 1:], found[name][:, 1:]) for name in layers]
        first = torch.stack([(full[name][:, 0] - found[name][:, 0]).abs().amax(1) for name in layers]).amax(0)
        figures[recipe.name] = {
            "others_db": sum(others) / len(others),
            "others_worst_db": min(others),
            "row_0_equal_share": float((first < 1e-5).double().mean()),
            "row_0_largest_error": float(first.max()),
            "output_db": sqnr(full[""], found[""]),
        }
        print(f"  {recipe.name:5} W8A{bits}: {figures[recipe.name]}", flush=True)
    return figures


def main() -> None:
    """Both cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=float, default=80.0)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    records = Records(f"mixdq_bos-A{args.bits}", vars(args))
    pipe = load_pipeline(bundled("emoji"))
    _, denoiser = denoiser_of(pipe)
    denoiser.eval().requires_grad_(False)
    prompts = (bundled("emoji") / "prompts.txt").read_text().splitlines()[:4]
    run = sampler(pipe, prompts=prompts, steps=args.steps, images=4, batch=4)
    with tempfile.TemporaryDirectory() as folder:
        print("as it is")
        calibration = dq.record(denoiser, run, out=Path(folder) / "plain", progress=False)
        records.put("as it is", compare(denoiser, calibration, args.bits))
        print(f"planted, x{args.factor:g}")
        for name in kv_layers(denoiser, calibration):
            layer: Any = denoiser.get_submodule(name)
            layer.weight[:, CHANNEL] /= args.factor
        with planted(pipe.text_encoder, args.factor):
            calibration = dq.record(denoiser, run, out=Path(folder) / "planted", progress=False)
        records.put(f"planted x{args.factor:g}", compare(denoiser, calibration, args.bits))


if __name__ == "__main__":
    main()
