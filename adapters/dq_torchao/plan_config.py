"""A calibrated plan as a torchao config: ``quantize_(denoiser, PlanConfig("plan/"), linear_and_conv2d)``.

The config is data. It holds either the folder of a plan and the plan's hash, or the plan itself, tensors and all
(base64 of safetensors), and survives ``config_to_dict``, JSON and ``config_from_dict`` in another process.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from dq_plugins.errors import PlanError
from dq_plugins.plan import PLAN, QuantPlan
from dq_torchao.adapter import begin, begun_with, lower_planned
from dq_torchao.layer_filter import LayerFilter, denoiser_of_layer
from dq_torchao.versions import Versioned

EMBEDDED_LIMIT = 64 << 20
"""Largest plan in bytes that is carried inside a config; learned rounding makes plans as large as the weights."""


@dataclass(repr=False)
class PlanConfig(Versioned, AOBaseConfig):
    """Quantize a denoiser as a plan says.

    Attributes:
        plan: folder of a saved plan, or a `dq_plugins.QuantPlan`, which the config then carries inside.
        plan_hash: hash of the plan; a folder that holds another plan by the time it is used is refused.
        out_of_range: what a timestep outside the calibrated range does: ``"error"``, or ``"nearest"`` group.
        temporal_fallback: what a timestep that the plan's temporal table lacks does: ``"error"``, or ``"live"``.
        uniform_timesteps: every call has one timestep for the whole batch; see `dq_torchao.apply`.

    Example::

        quantize_(denoiser, PlanConfig("plan/"), linear_and_conv2d)

    What the filter does not select stays in full precision, and `dq_torchao.execution_report` says so. `filter` selects
    all that the plan quantizes; so does `dq_torchao.apply`, which needs no filter.
    """

    plan: str | dict[str, Any]
    plan_hash: str = ""
    out_of_range: Literal["error", "nearest"] = "error"
    temporal_fallback: Literal["error", "live"] = "error"
    uniform_timesteps: bool = False
    version: int = 1

    def __post_init__(self) -> None:
        given: object = self.plan
        if isinstance(given, QuantPlan):
            self.plan_hash = given.hash
            self.plan = _embed(given)
        elif isinstance(given, str | Path):
            self.plan = str(given)
            self.plan_hash = self.plan_hash or QuantPlan.load(self.plan).hash
        elif not (isinstance(given, dict) and self.plan_hash):
            raise PlanError(
                f"PlanConfig: plan is the folder of a saved plan or a QuantPlan, got {type(given).__name__}"
                + (" without its hash" if isinstance(given, dict) else "")
            )

    def resolve(self) -> QuantPlan:
        """The plan.

        Raises:
            PlanError: it is missing, damaged, of a newer format, or another than the one the config was made for.
        """
        plan = QuantPlan.load(self.plan) if isinstance(self.plan, str) else _extract(self.plan)
        if plan.hash != self.plan_hash:
            where = f"the plan in {self.plan}" if isinstance(self.plan, str) else "the plan inside the config"
            raise PlanError(
                f"{where} has hash {plan.hash[:12]}, and the config was made for {self.plan_hash[:12]}: it was "
                "replaced or altered. Make the config again with PlanConfig(folder)."
            )
        return plan

    def filter(self) -> LayerFilter:
        """A ``filter_fn`` that selects every layer that the plan quantizes, of whatever kind."""
        names = {name for name, layer in self.resolve().layers.items() if layer.quantized}
        return LayerFilter(lambda _, name: name in names)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `dq_torchao.apply`."""
        return {name: getattr(self, name) for name in ("out_of_range", "temporal_fallback", "uniform_timesteps")}

    def __repr__(self) -> str:
        """Where the plan is, instead of all that it holds."""
        plan = repr(self.plan) if isinstance(self.plan, str) else "<inside>"
        options = ", ".join(f"{name}={value!r}" for name, value in self.options().items())
        return f"PlanConfig(plan={plan}, plan_hash={self.plan_hash[:12]!r}, {options})"


def _embed(plan: QuantPlan) -> dict[str, Any]:
    record, tensors = PLAN.seal(plan.validate())
    data = safetensors.torch.save(tensors)
    if len(data) > EMBEDDED_LIMIT:
        raise PlanError(
            f"the plan holds {len(data) >> 20} MiB of tensors, too much to carry inside a config (at most "
            f"{EMBEDDED_LIMIT >> 20} MiB): save it, and give the folder: PlanConfig(plan.save('plan/'))"
        )
    return {"record": record, "tensors": base64.b64encode(data).decode("ascii")}


def _extract(embedded: dict[str, Any]) -> QuantPlan:
    try:
        record, data = embedded["record"], base64.b64decode(embedded["tensors"], validate=True)
        tensors = safetensors.torch.load(data)
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise PlanError(f"the plan inside a PlanConfig is damaged: {type(error).__name__}: {error}") from error
    return PLAN.open(record, tensors, "the plan inside a PlanConfig")


@register_quantize_module_handler(PlanConfig)
def handle_layer(layer: nn.Module, config: PlanConfig) -> nn.Module:
    """torchao's handler: called once for every layer that the filter selects."""
    denoiser, name = denoiser_of_layer(layer, "PlanConfig", "dq_torchao.apply(denoiser, plan)")
    if not begun_with(denoiser, config.plan_hash):
        begin(denoiser, config.resolve(), **config.options())
    lower_planned(denoiser, name)
    return layer
