"""One small run through everything that depends on another package; needs nothing of ours but the installed package.

    python smoke.py FOLDER

It prints one line of JSON: the versions that are installed, and for each stage "ok", "absent" (its package is not
installed), or the error. Warnings of deprecation that modules of ours cause count as errors.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchao", "diffusers", "transformers", "brevitas", "numpy")
OURS = r"(dq_plugins|dq_torchao|dq_brevitas|dq_diffusers)(\..*)?"


class Smoke:
    """The stages, in the order of `STAGES`; each keeps what the next ones use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def record(self) -> None:
        """Full-precision sampling, recorded and read again."""
        import dq_plugins as dq
        from dq_plugins.testing.denoiser import TinyDenoiser, sample

        self.dq, self.denoiser = dq, TinyDenoiser().requires_grad_(False)
        recorded = dq.record(self.denoiser, sample, self.folder / "calib", progress=False)
        self.calibration = dq.CalibrationSet.open(self.folder / "calib")
        assert self.calibration.hash == recorded.hash

    def plan(self) -> None:
        """A plan by the default recipe, saved and loaded, and a plain one, which every export takes."""
        plan = self.dq.make_plan(self.denoiser, self.calibration, "default", progress=False)
        plan.save(self.folder / "plan")
        self.quant_plan = self.dq.QuantPlan.load(self.folder / "plan")
        assert self.quant_plan.hash == plan.hash
        self.simple = self.dq.make_plan(self.denoiser, self.calibration, "fast", progress=False)

    def simulate(self) -> None:
        """The plan in simulation."""
        self.simulated = self.near("simulate", None)

    def torchao(self) -> None:
        """The plan in integers, eager and compiled, saved and loaded; torchao's own verb; a table of widths."""
        import dq_torchao
        import torch
        from torchao.quantization import quantize_

        from dq_plugins.testing.denoiser import TinyDenoiser, sample

        model = self.near("torchao", self.simulated)
        states = [found.state for found in dq_torchao.execution_report(model).values()]
        assert "integer" in states, states
        dq_torchao.save(model, self.folder / "torchao")
        fresh = dq_torchao.load(TinyDenoiser(seed=1).requires_grad_(False), self.folder / "torchao")
        call = next(iter(self.calibration.calls()))
        assert torch.equal(call.run(fresh), call.run(model))
        other = TinyDenoiser().requires_grad_(False)
        quantize_(other, dq_torchao.TimestepInt8Config(step="prepare"), dq_torchao.linear_and_conv2d)
        sample(other)
        quantize_(other, dq_torchao.TimestepInt8Config(step="convert"), dq_torchao.linear_and_conv2d)
        self.close(call.run(other), call.run(self.denoiser), 20)
        dq_torchao.to_fqn_config(self.simple, self.denoiser)

    def compiled(self) -> None:
        """The integer denoiser under torch.compile (needs a C++ compiler)."""
        import dq_torchao  # noqa: F401
        import torch

        model = self.dq.apply(self.denoiser, self.quant_plan, "torchao")
        call = next(iter(self.calibration.calls()))
        expected = call.run(model)
        model.compile()
        with torch.no_grad():
            self.close(call.run(model), expected, 40)

    def pt2e(self) -> None:
        """The quantizer of PT2E."""
        import torch
        from dq_torchao.pt2e import TimestepX86Quantizer
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        from dq_plugins.testing.denoiser import example_inputs, sample

        exported = torch.export.export(self.denoiser, (), example_inputs()).module()
        prepared = prepare_pt2e(exported, TimestepX86Quantizer())
        sample(prepared)
        call = next(iter(self.calibration.calls()))
        self.close(call.run(convert_pt2e(prepared)), call.run(self.denoiser), 15)

    def brevitas(self) -> None:
        """The plan in Brevitas: saved, loaded, read back, in inference mode, trained by one step."""
        import dq_brevitas
        import torch

        from dq_plugins.testing.denoiser import TinyDenoiser

        model = self.near("brevitas", self.simulated)
        dq_brevitas.save(model, self.folder / "brevitas")
        call = next(iter(self.calibration.calls()))
        fresh = self.dq.apply(TinyDenoiser().requires_grad_(False), self.quant_plan, "brevitas")
        dq_brevitas.load(fresh, self.folder / "brevitas")
        assert torch.equal(call.run(fresh), call.run(model))
        dq_brevitas.plan_from_model(model, self.quant_plan)
        with dq_brevitas.inference_mode(fresh):
            self.close(call.run(fresh), call.run(model), 60)
        call.run(self.dq.apply(TinyDenoiser(), self.simple, "brevitas")).square().sum().backward()

    def diffusers(self) -> None:
        """The bundled pipeline: quantized in one call, saved, loaded by diffusers, sampled to the same pixels."""
        import dq_diffusers
        import numpy as np
        from diffusers import DiTTransformer2DModel

        pipeline = dq_diffusers.load_pipeline(self.dq.bundled("digits"))
        dq_diffusers.quantize(pipeline, recipe="fast", steps=2, images=2, progress=False)
        pipeline.transformer.save_pretrained(self.folder / "transformer")
        loaded = DiTTransformer2DModel.from_pretrained(self.folder / "transformer")
        import torch

        pipeline.set_progress_bar_config(disable=True)
        images = []
        for transformer in (pipeline.transformer, loaded):
            pipeline.transformer = transformer
            images.append(
                pipeline([1, 2], num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
            )
        assert np.array_equal(*images)

    def onnx(self) -> None:
        """Export of a Brevitas denoiser to ONNX, run by onnxruntime."""
        import dq_brevitas
        import onnxruntime
        import torch

        model = self.dq.apply(self.denoiser, self.simple, "brevitas")
        inputs = next(iter(self.calibration.calls())).inputs
        path = self.folder / "model.onnx"
        dq_brevitas.export_onnx_qcdq(model, kwargs=inputs, path=path)
        session = onnxruntime.InferenceSession(path, dq_brevitas.onnxruntime_options())
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            self.close(torch.from_numpy(found), model(**inputs), 30)

    def command_line(self) -> None:
        """The command line, in a process of its own."""
        import subprocess

        subprocess.run([sys.executable, "-m", "dq_plugins.cli", "list"], check=True, capture_output=True)

    def near(self, backend: str, reference: Any) -> Any:
        """The plan in a backend, whose output is near full precision's, and nearer to another's."""
        model = self.dq.apply(self.denoiser, self.quant_plan, backend)
        for call in self.calibration.calls():
            self.close(call.run(model), call.run(self.denoiser), 25)
            if reference is not None:
                self.close(call.run(model), call.run(reference), 50)
        return model

    @staticmethod
    def close(found: Any, expected: Any, decibels: float) -> None:
        """Signal to noise."""
        noise = float(((found - expected).square().sum() / expected.square().sum()).detach())
        assert noise < 10 ** (-decibels / 10), f"noise {noise:.1e} of the output"


STAGES = ("record", "plan", "simulate", "torchao", "compiled", "pt2e", "brevitas", "onnx", "diffusers", "command_line")


def outcome(stage: Callable[[], None]) -> str:
    """Run a stage."""
    try:
        stage()
    except Exception as error:
        if (isinstance(error, ImportError) and "not installed" in str(error)) or isinstance(error, ModuleNotFoundError):
            return "absent"
        place = traceback.extract_tb(error.__traceback__)[-1]
        traceback.print_exc()
        return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    return "ok"


def main(folder: str) -> None:
    """Run the stages."""
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.filterwarnings("error", category=category, module=OURS)
    smoke = Smoke(Path(folder))
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    stages = {name: outcome(getattr(smoke, name)) for name in STAGES}
    print(json.dumps({"versions": versions, "stages": stages}))


if __name__ == "__main__":
    main(sys.argv[1])
