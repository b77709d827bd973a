"""Each kind of bad input gets one paragraph that names the culprit and the way out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from denoisers import SCHEDULE, example, recorded, sampler, tiny_denoiser
from torch import Tensor, nn

import dq_plugins as dq
from dq_plugins.errors import CalibrationError, MissingDependencyError, PlanError, TimestepError, TraceError, require
from dq_plugins.plan import LayerPlan


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    calibration = recorded(denoiser, tmp_path_factory.mktemp("calib"))
    return denoiser, calibration, dq.make_plan(denoiser, calibration, "fast", progress=False)


def paragraph(error: pytest.ExceptionInfo, *words: str) -> None:
    text = str(error.value)
    assert isinstance(error.value, dq.DQError)
    assert "\n\n" not in text
    for word in words:
        assert word in text, f"{word!r} not in: {text}"


def test_a_forward_without_a_timestep(tmp_path: Path) -> None:
    class Classifier(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image

    with pytest.raises(TimestepError) as error:
        dq.record(Classifier(), lambda m: m(torch.zeros(1)), tmp_path)
    paragraph(error, "Classifier", "image", "timestep=")


def test_a_denoiser_that_cannot_be_exported() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(2, 2, 1)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.a(sample) if sample.sum() > 0 else sample

    with pytest.raises(TraceError) as error:
        dq.trace(Moody().to("meta"), example())  # with weights it would be called
    paragraph(error, "Moody", "cannot be traced", "if")


def test_an_empty_calibration_set(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as error:
        dq.record(tiny_denoiser(), lambda denoiser: None, tmp_path, progress=False)
    paragraph(error, "never called the denoiser", "that very module")
    with pytest.raises(CalibrationError) as error:
        dq.CalibrationSet.open(tmp_path / "nothing")
    paragraph(error, "nothing")


@pytest.mark.parametrize("backend", ["simulate", "torchao"])
def test_a_timestep_outside_the_recorded_range(case, backend: str) -> None:
    denoiser, _, plan = case
    model = dq.apply(denoiser, plan, backend=backend)
    with pytest.raises(TimestepError) as error:
        model(torch.zeros(1, 2, 8, 8), torch.tensor([5000.0]))
    paragraph(error, "5000", "out_of_range='nearest'")


def test_nan_activations(tmp_path: Path) -> None:
    denoiser = tiny_denoiser(1)
    with torch.no_grad():
        denoiser.body[1].alpha.bias[0] = float("nan")
    with pytest.raises(CalibrationError) as error:
        dq.record(denoiser, sampler(), tmp_path, progress=False)
    paragraph(error, "NaN")


def test_nan_inside_the_denoiser_names_the_layer(case, tmp_path: Path) -> None:
    class Hidden(nn.Module):
        """The output is clean, a layer's input is not."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            bad = self.b(sample * torch.where(timestep > 500, torch.nan, 1.0).reshape(-1, 1, 1, 1))
            return self.a(sample) + torch.nan_to_num(bad)

    torch.manual_seed(0)
    denoiser = Hidden().eval().requires_grad_(False)
    with pytest.raises(CalibrationError) as error:
        dq.make_plan(denoiser, recorded(denoiser, tmp_path), "fast", progress=False)
    paragraph(error, "'b'", "NaN", "501")


def test_a_plan_of_another_model(case) -> None:
    _, _, plan = case
    with pytest.raises(PlanError) as error:
        dq.apply(tiny_denoiser(7), plan, backend="torchao")
    paragraph(error, "other weights", "TinyDenoiser")


def test_a_plan_with_an_unknown_layer(case, tmp_path: Path) -> None:
    denoiser, _, plan = case
    loaded = dq.QuantPlan.load(plan.save(tmp_path))
    loaded.layers["up.9.conv"] = LayerPlan("conv2d")
    with pytest.raises(PlanError) as error:
        dq.apply(denoiser, loaded, backend="simulate")
    paragraph(error, "'up.9.conv'", "another model")


@pytest.mark.parametrize("framework", ["torchao", "brevitas"])
def test_a_missing_extra(framework: str) -> None:
    with pytest.raises(MissingDependencyError) as error:
        require("no_such_framework", "torchao", "run int8 kernels")
    paragraph(error, "no_such_framework", "pip install 'dq-plugins[torchao]'")
    code = f"import sys; sys.modules[{framework!r}] = None; import dq_{framework}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"pip install 'dq-plugins[{framework}]'" in done.stderr.splitlines()[-1]


def test_a_plan_with_nothing_but_json(case, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"format_version": 1}))
    with pytest.raises(PlanError) as error:
        dq.QuantPlan.load(tmp_path)
    paragraph(error, "is not a plan")


def test_unknown_names_answer_with_close_ones(case) -> None:
    denoiser, calibration, _ = case
    with pytest.raises(dq.DQError) as error:
        dq.make_plan(denoiser, calibration, "defautl", progress=False)
    paragraph(error, "default")
    assert SCHEDULE
