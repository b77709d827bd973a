"""How a quantized denoiser was made, as a torchao config: what a checkpoint needs beside its tensors.

Shapes and widths are here, values are in the checkpoint: the plan's record without its tensors, which `skeleton` fills
with placeholders, and how every layer runs, so that loading decides nothing again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig

from dq_plugins.artifact.codec import decode
from dq_plugins.errors import DQError, PlanError
from dq_plugins.layer_kinds import kind_of
from dq_plugins.libraries import library_adapter
from dq_plugins.plan import PLAN, QuantPlan
from dq_torchao.report import Execution, execution_report
from dq_torchao.versions import Versioned

ATTRIBUTE = "dq_checkpoint"
SLACK = 1 << 24
"""Values that a plan may have whatever the size of its denoiser: tables of a small one are larger than it."""


def _check_claim(claim: list[Any]) -> list[Any]:
    if not (len(claim) == 2 and isinstance(claim[0], str) and isinstance(claim[1], list)):
        raise ValueError("a tensor is described by its dtype and its shape")
    if not all(type(extent) is int and extent >= 0 for extent in claim[1]):
        raise ValueError(f"a shape has whole numbers from 0, got {claim[1][:4]}")
    return claim


TensorClaim = Annotated[list[Any], AfterValidator(_check_claim)]
"""``["float32", [8]]``; a list, because torchao's configs have no tuples."""


@dataclass(repr=False)
class CheckpointConfig(Versioned, AOBaseConfig):
    """The structure of a denoiser that `dq_torchao.apply` has quantized.

    It is written beside the tensors when the denoiser is saved; nobody needs to make one by hand.

    Attributes:
        plan: the JSON record of the plan.
        tensors: dtype and shape of every tensor of the plan: ``{name: ["float32", [8]]}``.
        executions: how each layer runs: the fields of `dq_torchao.Execution`, and its class as ``form``, by layer.
        options: how the plan was applied: ``out_of_range``, ``temporal_fallback``, ``uniform_timesteps``.
    """

    plan: dict[str, Any]
    tensors: dict[str, TensorClaim]
    executions: dict[str, dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    version: int = 1

    @classmethod
    def of(cls, model: nn.Module, plan: QuantPlan, options: Mapping[str, Any]) -> CheckpointConfig:
        """The config of a denoiser that has just been quantized."""
        record, tensors = PLAN.seal(plan.validate())
        shapes = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
        config = cls(record, shapes, {}, dict(options))
        for name in execution_report(model):
            config.note_layer(model, name)
        return config

    def note_layer(self, model: nn.Module, name: str) -> None:
        """Note how layer ``name`` runs now."""
        layer: Any = model.get_submodule(name)
        self.executions[name] = {**asdict(layer.execution), "form": type(layer).__name__}

    def skeleton(self, denoiser: nn.Module) -> QuantPlan:
        """The plan with placeholders for its tensors, which take no memory.

        Args:
            denoiser: that the plan is for. What the tensors claim to take must be in proportion to its weights, and
                fit its layers: layers are made from these claims before a value is there.

        Raises:
            PlanError: the record is damaged or of a newer format.
        """
        claimed = sum(prod(shape) for _, shape in self.tensors.values())
        if claimed > 4 * sum(p.numel() for p in denoiser.parameters()) + SLACK:
            raise PlanError(
                f"the quantization config of this checkpoint claims {claimed} values of scales, codes and tables, "
                f"which no plan for this {type(denoiser).__name__} has: it is damaged"
            )
        try:
            tensors = {name: _placeholder(dtype, shape) for name, (dtype, shape) in self.tensors.items()}
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise PlanError(f"the quantization config of this checkpoint is damaged: {error}") from error
        where = "the quantization config of this checkpoint"
        return PLAN.decode(PLAN.envelope(self.plan, where).record, tensors, where)

    def execution(self, layer: str) -> tuple[Execution, str]:
        """How ``layer`` runs, and the name of its class.

        Raises:
            PlanError: the config does not say.
        """
        try:
            fields = dict(self.executions[layer])
            form = fields.pop("form")
            return decode(Execution, fields, {}), form
        except (KeyError, ValueError) as error:
            raise PlanError(
                f"the quantization config of this checkpoint does not say how layer {layer!r} runs: it is damaged"
            ) from error

    def __repr__(self) -> str:
        """Numbers instead of all that it holds."""
        model = self.plan.get("record", {}).get("model")
        return f"CheckpointConfig({model}, {len(self.executions)} layers, version={self.version})"


def checkpoint_config_of(model: nn.Module) -> CheckpointConfig | None:
    """The config of a denoiser that `dq_torchao.apply` has quantized; None for any other."""
    config = model.__dict__.get(ATTRIBUTE)
    return config if isinstance(config, CheckpointConfig) else None


def require_unreplaced(model: nn.Module) -> None:
    """Raise `DQError` where a plain layer stands in the place of a quantized one: a checkpoint would have no codes."""
    config = checkpoint_config_of(model)
    modules = dict(model.named_modules())
    quantized = [] if config is None else [n for n, e in config.executions.items() if e["state"] != "full precision"]
    replaced = [n for n in quantized if kind_of(m := modules.get(n, model)) and not hasattr(m, "execution")]
    if replaced:
        raise DQError(
            f"layer {replaced[0]!r} and {len(replaced) - 1} others were quantized, and layers in full precision have "
            "taken their place since (fuse_qkv_projections makes such): a checkpoint of this denoiser could not be "
            "loaded. Quantize the full-precision denoiser in the form that it is to have"
        )


def remember(model: nn.Module, config: CheckpointConfig) -> None:
    """Keep ``config`` on a quantized denoiser, and tell the library that it comes from, which may save it later."""
    setattr(model, ATTRIBUTE, config)
    make_savable = getattr(library_adapter(model), "make_savable", None)
    if make_savable is not None:
        make_savable(model, config)


def _placeholder(dtype: str, shape: list[int]) -> Tensor:
    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype):
        raise TypeError(f"{dtype!r} is not a dtype")
    return torch.ones((), dtype=kind).expand(shape)
