from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from denoisers import recorded, sampler, tiny_denoiser
from torch import nn

import dq_plugins as dq
from dq_plugins.errors import DQError, PlanError
from dq_plugins.full_precision import quantized_by, require_full_precision


class Pipeline:
    """Looks like one of diffusers'."""

    components = {"vae": nn.Identity(), "unet": nn.Identity(), "scheduler": object()}  # noqa: RUF012


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser, folder = tiny_denoiser(), tmp_path_factory.mktemp("case")
    calibration = recorded(denoiser, folder / "calib")
    plan = dq.make_plan(denoiser, folder / "calib", "fast", progress=False)
    plan.save(folder / "plan")
    return denoiser, calibration, plan, folder


def linear(denoiser: nn.Module) -> nn.Linear:
    return next(m for m in denoiser.modules() if isinstance(m, nn.Linear))


def by_torchao(denoiser: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(denoiser, Int8WeightOnlyConfig())
    return denoiser


def by_brevitas(denoiser: nn.Module) -> nn.Module:
    from brevitas.graph.quantize import layerwise_quantize

    return layerwise_quantize(denoiser)


@pytest.mark.parametrize("take", [require_full_precision, lambda p: dq.record(p, sampler(), "nowhere")])
def test_a_pipeline_is_no_denoiser(take) -> None:
    with pytest.raises(DQError, match=r"this is a Pipeline\. Of its modules \(vae, unet\), pass the one"):
        take(Pipeline())


def by_diffusers(denoiser: nn.Module) -> nn.Module:
    class GGUFLinear(nn.Linear):  # as a loader of diffusers' puts into a denoiser
        pass

    GGUFLinear.__module__ = "diffusers.quantizers.gguf.utils"
    linear(denoiser).__class__ = GGUFLinear
    return denoiser


@pytest.mark.parametrize("quantize", [by_torchao, by_brevitas, by_diffusers])
def test_a_denoiser_of_another_quantizer_is_refused_by_name(case, quantize, tmp_path) -> None:
    quantized = quantize(copy.deepcopy(case[0]))
    with pytest.raises(PlanError, match=rf"TinyDenoiser is quantized already: .*{quantize.__name__[3:]}"):
        dq.make_plan(quantized, case[1], "fast", progress=False)
    with pytest.raises(PlanError, match="quantized already"):
        dq.record(quantized, sampler(), tmp_path / "calib", progress=False)
    assert not (tmp_path / "calib").exists()


def flagged(denoiser: nn.Module) -> None:
    denoiser.is_loaded_in_8bit = True


def with_codes_beside(denoiser: nn.Module) -> None:
    linear(denoiser).register_buffer("qweight", torch.zeros(2, dtype=torch.int32))


def with_a_state(denoiser: nn.Module) -> None:
    linear(denoiser).weight.quant_state = {"absmax": torch.ones(1)}


def of_whole_numbers(denoiser: nn.Module) -> None:
    layer = linear(denoiser)
    layer.weight = nn.Parameter(layer.weight.detach().char(), requires_grad=False)


@pytest.mark.parametrize(
    ("mark", "evidence"),
    [(flagged, "is_loaded_in_8bit"), (with_codes_beside, "qweight"), (with_a_state, "quant_state"),
     (of_whole_numbers, "int8 numbers")],
)  # fmt: skip
def test_a_denoiser_that_only_attributes_show_to_be_quantized_is_refused(case, mark, evidence: str) -> None:
    denoiser = copy.deepcopy(case[0])
    denoiser.is_loaded_in_8bit = denoiser.is_loaded_in_4bit = False  # as a loader leaves them
    require_full_precision(denoiser)
    mark(denoiser)
    with pytest.raises(PlanError, match=f"quantized already: .*{evidence}"):
        require_full_precision(denoiser)


@pytest.mark.parametrize("backend", ["simulate", "torchao", "brevitas"])
def test_a_plan_is_applied_once(case, backend: str) -> None:
    denoiser, calibration, plan, _ = case
    quantized = dq.apply(denoiser, plan, backend=backend)
    assert quantized_by(denoiser) == ""
    for again in (lambda: dq.apply(quantized, plan), lambda: dq.make_plan(quantized, calibration)):
        with pytest.raises(PlanError, match="quantized already"):
            again()


def test_folders_stand_for_what_was_saved_there(case) -> None:
    denoiser, calibration, plan, folder = case
    assert dq.make_plan(denoiser, calibration, "fast", progress=False) == plan
    assert dq.apply(denoiser, str(folder / "plan"), backend="simulate") is not denoiser
    with pytest.raises(DQError, match="plan was expected there"):
        dq.apply(denoiser, folder / "nowhere")


def test_a_compiled_denoiser_stands_for_its_module(case, tmp_path: Path) -> None:
    denoiser, calibration, plan, _ = case
    compiled = torch.compile(copy.deepcopy(denoiser), backend="eager")
    assert dq.make_plan(compiled, calibration, "fast", progress=False) == plan
    assert isinstance(dq.apply(compiled, plan, backend="torchao"), type(denoiser))
