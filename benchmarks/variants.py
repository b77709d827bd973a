"""Ways to run a denoiser, by name: full precision, torchao's own quantization, and ours.

A builder takes the full-precision model and returns a denoiser of its own; the model is left as it is.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._inductor import config as inductor_config

from benchmarks.models import Inputs, Model
from benchmarks.peers import openvino, sdnq, torchao
from dq_plugins import make_plan, record
from dq_plugins.recipe import Recipe, Step

Builder = Callable[[Model], nn.Module]

CALIBRATION_TIMESTEPS = tuple(range(975, 0, -50))
GROUPS = 8


class InHalf(nn.Module):
    """A denoiser in bfloat16 behind a float32 interface, so that errors compare."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser.to(torch.bfloat16)

    def forward(self, **inputs: Any) -> Any:
        halved = {
            name: x.to(torch.bfloat16) if name != "timestep" and x.is_floating_point() else x
            for name, x in inputs.items()
        }
        return self.denoiser(**halved)[0].float()


def float32(model: Model) -> nn.Module:
    return copy.deepcopy(model.denoiser)


def float32_onednn(model: Model) -> nn.Module:
    """The fastest exact float32 of the machine: products by oneDNN, where it is exact, weights laid out for it once
    where it is compiled (inductor does that when it freezes them)."""
    from dq_torchao.kernels.floating import why_not_exact

    if reason := why_not_exact():
        raise ImportError(reason)
    denoiser: Any = copy.deepcopy(model.denoiser)
    # a class of its own: a compiler takes what it compiled for another copy of the same class
    denoiser.__class__ = type("OneDNN", (type(denoiser),), {})
    denoiser.around = _onednn_frozen
    return denoiser


@contextmanager
def _onednn_frozen() -> Iterator[None]:
    from dq_torchao.kernels.floating import onednn_float32

    with onednn_float32(), inductor_config.patch(freezing=True):
        yield


def bfloat16(model: Model) -> nn.Module:
    return InHalf(copy.deepcopy(model.denoiser))


def torchao_weight_only(model: Model) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    denoiser = copy.deepcopy(model.denoiser)
    quantize_(denoiser, Int8WeightOnlyConfig(set_inductor_config=False))
    return denoiser


def torchao_dynamic(model: Model) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    denoiser = copy.deepcopy(model.denoiser)
    quantize_(denoiser, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return denoiser


def _calibrate(denoiser: Callable[..., object], inputs: Callable[[float, int], Inputs]) -> None:
    with torch.no_grad():
        for t in CALIBRATION_TIMESTEPS:
            denoiser(**inputs(t, t))


def _calls(model: Model) -> list[Inputs]:
    return [model.inputs(t, t) for t in CALIBRATION_TIMESTEPS]


def pt2e_static(model: Model) -> nn.Module:
    return torchao.pt2e(model.denoiser, _calls(model), torchao.x86_quantizer())


def pt2e_groups(model: Model, groups: int = GROUPS) -> nn.Module:
    from dq_torchao.pt2e import TimestepX86Quantizer

    return torchao.pt2e(model.denoiser, _calls(model), TimestepX86Quantizer(groups))


def ours(model: Model, groups: int = GROUPS, *, tuned: bool = False, uniform: bool = False) -> nn.Module:
    """Calibrated by running it.

    ``tuned``: layers go integer only where that is faster in eager mode. ``uniform``: told that all samples of a batch
    have the same timestep, as in sampling.
    """
    import dq_torchao
    from torchao.quantization import quantize_

    denoiser = copy.deepcopy(model.denoiser)
    config = dq_torchao.TimestepInt8Config(step="prepare", groups=groups)
    quantize_(denoiser, config, filter_fn=dq_torchao.linear_and_conv2d)
    _calibrate(denoiser, model.inputs)
    plan = dq_torchao.convert(denoiser)
    if not (tuned or uniform):
        return denoiser
    choices = dq_torchao.tune(model.denoiser, plan, model.inputs(500, 0)) if tuned else None
    return dq_torchao.apply(copy.deepcopy(model.denoiser), plan, choices=choices, uniform_timesteps=uniform)


def by_recipe(model: Model, *names: str, ranges: str = "static", weight_bits: int = 8) -> nn.Module:
    """Ranges in `GROUPS` groups by a recipe (or ``"dynamic"`` ones), with further passes."""
    import dq_torchao

    order = (
        "channel-balance",
        "low-rank",
        "weight-ranges",
        "timestep-groups",
        "activation-ranges",
        "attention-ranges",
        "bias-correction",
    )
    passes = {"weight-ranges", "timestep-groups", "activation-ranges", *names}
    recipe = Recipe("benchmark", "", tuple(Step(name) for name in order if name in passes))
    denoiser = copy.deepcopy(model.denoiser)
    with tempfile.TemporaryDirectory() as folder:
        calls = record(denoiser, lambda each: _calibrate(each, model.inputs), folder, progress=False)
        options: dict[str, dict[str, Any]] = {
            "timestep-groups": {"groups": GROUPS},
            "activation-ranges": {"ranges": ranges},
            # whether it wins anything on random weights or not
            **({"low-rank": {"methods": ("principal",), "least_gain": 0.0}} if "low-rank" in names else {}),
        }
        plan = make_plan(denoiser, calls, recipe, weight_bits=weight_bits, options=options, progress=False)
    for part in ("balance", "subspace"):
        count = sum(getattr(layer, part) is not None for layer in plan.layers.values())
        print(f"{count} of {len(plan.layers)} layers have a {part}")
    return dq_torchao.apply(denoiser, plan, uniform_timesteps=True)


def openvino_float(model: Model) -> nn.Module:
    example = model.inputs(500, 0)
    return openvino.compiled(openvino.converted(model.denoiser, example), list(example))


def openvino_int8(model: Model) -> nn.Module:
    calls = _calls(model)
    return openvino.compiled(openvino.quantized(model.denoiser, calls), list(calls[0]))


VARIANTS: dict[str, Builder] = {
    "fp32": float32,
    "fp32, oneDNN": float32_onednn,
    "bf16": bfloat16,
    "torchao int8 weight-only": torchao_weight_only,
    "torchao int8 dynamic": torchao_dynamic,
    "PT2E int8 static": pt2e_static,
    "SDNQ int8": lambda model: sdnq.quantized(model.denoiser),
    "OpenVINO fp32": openvino_float,
    "OpenVINO int8 (NNCF)": openvino_int8,
    "PT2E, 1 group (ours)": lambda model: pt2e_groups(model, 1),
    "PT2E, 8 groups (ours)": pt2e_groups,
    "W8A8, 1 group (ours)": lambda model: ours(model, 1),
    "W8A8, 8 groups (ours)": ours,
    "W8A8, 1 group, uniform t (ours)": lambda model: ours(model, 1, uniform=True),
    "W8A8, 8 groups, uniform t (ours)": lambda model: ours(model, uniform=True),
    "W8A8, 1 group, uniform t, bf16 (ours)": lambda model: InHalf(ours(model, 1, uniform=True)),
    "W8A8, 8 groups, uniform t, bf16 (ours)": lambda model: InHalf(ours(model, uniform=True)),
    "W8A8, 8 groups, by recipe (ours)": by_recipe,
    "W8A8, 8 groups, bias table (ours)": lambda model: by_recipe(model, "bias-correction"),
    "W8A8, 8 groups, balance, bias table (ours)": lambda model: by_recipe(model, "channel-balance", "bias-correction"),
    "W8A8, dynamic ranges (ours)": lambda model: by_recipe(model, ranges="dynamic"),
    "W4A8, dynamic ranges (ours)": lambda model: by_recipe(model, ranges="dynamic", weight_bits=4),
    "W4A8, dynamic ranges, principal directions (ours)": lambda model: by_recipe(
        model, "low-rank", ranges="dynamic", weight_bits=4
    ),
    "W8A8, dynamic ranges, attention (ours)": lambda model: by_recipe(model, "attention-ranges", ranges="dynamic"),
    "W8A8, 8 groups, attention (ours)": lambda model: by_recipe(model, "attention-ranges"),
    "W8A8, 8 groups, attention, bias table (ours)": lambda model: by_recipe(
        model, "attention-ranges", "bias-correction"
    ),
    "W8A8, 8 groups, tuned (ours)": lambda model: ours(model, tuned=True, uniform=True),
}
CPU_ONLY = {name for name in VARIANTS if name.startswith(("PT2E", "OpenVINO", "fp32, oneDNN"))}
