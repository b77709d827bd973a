"""The config of diffusers' quantization method ``dq``: given to ``from_pretrained``, and kept in ``config.json``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from dq_plugins.errors import DQError, PlanError
from dq_plugins.plan import QuantPlan
from dq_plugins.plan.step_policy import StepPolicy, policy_of

if TYPE_CHECKING:
    from torch import nn
    from torchao.core.config import AOBaseConfig

ON_DISK = "dq (import dq_diffusers)"
"""The method in ``config.json``. A process that has not imported us quotes it: "Unknown quantization type, got ..."."""


class Method(str, Enum):
    """Our entry in diffusers' tables of methods."""

    DQ = "dq"


class DQConfig(QuantizationConfigMixin):
    """Quantize a denoiser while it is loaded.

    Args:
        plan: folder of a saved plan, or a `dq_plugins.QuantPlan`. The weights must be those that it was made for.
        config: instead of a plan a config of `dq_torchao`: ``PlanConfig``, or ``TimestepInt8Config``, which prepares
            the denoiser for calibration. It may stand in the place of the plan.
        dtypes: of a denoiser that was saved quantized; see `dq_diffusers.dtypes`. Nobody needs to give them.
        options: with a plan: ``out_of_range``, ``temporal_fallback``, ``uniform_timesteps``; see `dq_torchao.apply`.

    Attributes:
        step_policy: which steps keep inputs in 16 bits, as engines read it; of a denoiser that was quantized so.

    Raises:
        DQError: neither a plan nor a config, both, or a config of another library.

    Example::

        unet = UNet2DConditionModel.from_pretrained(folder, quantization_config=DQConfig("plan/"))
    """

    def __init__(
        self,
        plan: str | Path | QuantPlan | AOBaseConfig | None = None,
        config: AOBaseConfig | None = None,
        *,
        dtypes: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        from dq_torchao.serializable import CheckpointConfig, PlanConfig, TimestepInt8Config

        if (plan is None) == (config is None):
            raise DQError("DQConfig takes either a plan (its folder, or a QuantPlan) or a config of dq_torchao")
        if isinstance(plan, str | Path | QuantPlan):
            config = PlanConfig(plan, **options)  # type: ignore[arg-type]
        elif options:
            raise DQError(f"DQConfig: {', '.join(options)} go with a plan; a config of dq_torchao holds its own")
        config = plan if config is None else config
        if not isinstance(config, CheckpointConfig | PlanConfig | TimestepInt8Config):
            raise DQError(
                f"DQConfig takes a plan, a PlanConfig or a TimestepInt8Config, got a {type(config).__name__}. Configs "
                "of torchao itself go into diffusers.TorchAoConfig."
            )
        self.dtypes = dtypes or {}
        if not all(isinstance(getattr(torch, str(name), None), torch.dtype) for name in self.dtypes.values()):
            raise DQError(f"DQConfig: dtypes are names of torch's by name of buffer, got {self.dtypes}")
        self.quant_method = Method.DQ  # type: ignore[assignment]  # diffusers' own methods are an enum that is closed
        self.config = config
        self.step_policy: StepPolicy | None = None

    def to_dict(self) -> dict[str, Any]:
        """The config as data; what ``config.json`` holds."""
        from torchao.core.config import config_to_dict

        data = {"quant_method": ON_DISK, "config": config_to_dict(self.config), "dtypes": self.dtypes}
        return data if self.step_policy is None else self.step_policy.into(data)

    def note_step_policy(self, denoiser: nn.Module) -> None:
        """Keep the policy that the plan of a quantized denoiser follows; none where no policy says what it does."""
        from dq_torchao.serializable import CheckpointConfig

        try:
            found = policy_of(self.config.skeleton(denoiser)) if isinstance(self.config, CheckpointConfig) else None
        except PlanError:
            found = None  # some layers at some steps
        self.step_policy = None if found == StepPolicy() else found

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that `to_dict` gave.

        Raises:
            DQError: it is damaged, or of a newer dq-plugins.
        """
        from dq_torchao.config_data import config_from_json
        from dq_torchao.serializable import CheckpointConfig, PlanConfig, TimestepInt8Config

        data = config_dict.get("config")
        name = data.get("_type") if isinstance(data, dict) else None
        kinds = {kind.__name__: kind for kind in (CheckpointConfig, PlanConfig, TimestepInt8Config)}
        dtypes = config_dict.get("dtypes") or {}
        if not isinstance(dtypes, dict):
            raise DQError(f"the quantization config is damaged: dtypes is a {type(dtypes).__name__}")
        config = cls(config=config_from_json(data, kinds.get(str(name), CheckpointConfig)), dtypes=dtypes)
        config.step_policy = StepPolicy.from_config(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def __repr__(self) -> str:
        """What it holds, instead of all of it."""
        return f"DQConfig({self.config!r})"
