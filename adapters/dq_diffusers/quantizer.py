"""diffusers' ``save_pretrained`` and ``from_pretrained`` for denoisers that dq_torchao quantizes.

diffusers looks for a quantizer by the method name of the config, and for ``TorchAoConfig`` finds its own, which knows
linear weights only. `dq_diffusers.registration` puts a choice in front of it: our configs get `PlanQuantizer`, all
others the quantizer that was there before.

On disk a quantized denoiser is what diffusers writes: ``config.json`` with a ``quantization_config``, and safetensors,
sharded or not. Loading:

- ``from_pretrained(folder)`` of a quantized denoiser restores it bit for bit;
- ``from_pretrained(folder, quantization_config=TorchAoConfig(PlanConfig("plan/")))`` of a full-precision denoiser
  quantizes it when its weights are there, and checks that they are the plan's;
- ``TorchAoConfig(TimestepInt8Config())`` prepares the denoiser for calibration by sampling.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin, TorchAoConfig
from dq_torchao import linear_and_conv2d
from dq_torchao.adapter import apply
from dq_torchao.checkpoint import finish, rebuild
from dq_torchao.checkpoint_config import CheckpointConfig, checkpoint_config_of
from dq_torchao.checkpoint_files import CheckpointFiles, check_readable, integrity_metadata
from dq_torchao.plan_config import PlanConfig
from torch import Tensor, nn
from torchao.core.config import config_to_dict
from torchao.quantization import quantize_

from dq_diffusers.checkpoint_source import checkpoint_files
from dq_plugins.errors import DQError


class PlanQuantizer(DiffusersQuantizer):
    """Loads and saves denoisers whose ``TorchAoConfig`` holds one of our configs."""

    requires_calibration = False
    required_packages = ("torchao",)
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config: Any = quantization_config.quant_type  # type: ignore[attr-defined]
        if self.pre_quantized != isinstance(self.config, CheckpointConfig):
            raise DQError(_MISPLACED[self.pre_quantized].format(type(self.config).__name__))
        self.opened, self.files = False, cast("CheckpointFiles | None", None)
        self.exact: frozenset[str] = frozenset()
        self.dtype_given = False

    # Loading, in the order in which from_pretrained calls

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """First of all: no file is read unless it is safetensors, and a quantized checkpoint is verified."""
        if kwargs.get("device_map") == "disk" or "disk" in _devices(kwargs.get("device_map")):
            raise DQError("quantized denoisers cannot be offloaded to disk while loading; leave device_map out")
        if not self.opened and (files := checkpoint_files()) is not None:
            self._open(files)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype asked for; without one a quantized denoiser is loaded in the dtypes it was saved in."""
        self.dtype_given = torch_dtype is not None
        if torch_dtype is None and self.pre_quantized and self.files is not None:
            return _floating_dtype(self.files)
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """The files are known for certain here, where they could not be found earlier (a model on the hub)."""
        if not self.opened:
            self._open(checkpoint_files)
        return loaded_keys

    def _open(self, files: list[Any]) -> None:
        self.opened = True
        if self.pre_quantized:
            self.files = CheckpointFiles(files)
            self.files.verify(config_to_dict(self.config))
        else:
            check_readable(files)

    def preprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """As in the base class, but a denoiser of ours may be cast, so it is not marked as one that may not."""
        model.quantization_method = self.quantization_config.quant_method
        return self._process_model_before_weight_loading(model, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            return model
        plain = set(model.state_dict())
        rebuild(model, self.config)
        assert self.files is not None
        expected = model.state_dict()
        self.files.check(expected)
        self.exact = frozenset(set(expected) - plain)
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether the tensor is loaded as it is, instead of in the dtype that diffusers chooses."""
        return self.pre_quantized and (not self.dtype_given or param_name in self.exact)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put a tensor in its place; ``state_dict`` holds it as it was saved, ``param_value`` may have been cast."""
        owner, _, name = param_name.rpartition(".")
        module = model.get_submodule(owner)
        value = state_dict[param_name].to(target_device)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[name] = value

    def _process_model_after_weight_loading(self, model: Any) -> Any:
        if isinstance(self.config, CheckpointConfig):
            finish(model, self.config)
        elif isinstance(self.config, PlanConfig):
            apply(model, self.config.resolve(), **self.config.options())
        else:
            quantize_(model, self.config, filter_fn=linear_and_conv2d)
        config = checkpoint_config_of(model)
        if config is not None:
            self.config, self.quantization_config = config, TorchAoConfig(config)
        return model

    # Saving

    @property
    def is_serializable(self) -> bool:
        """Whether the denoiser can be saved; one that is being calibrated cannot."""
        return isinstance(self.config, CheckpointConfig)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state as it is, and the record that loading checks.

        Raises:
            DQError: a pickle was asked for.
        """
        if not safe_serialization:
            raise DQError(
                "save_pretrained(safe_serialization=False) writes a pickle, and quantized denoisers are not read from "
                "pickles, because reading one can run code. Leave the argument out."
            )
        return state_dict, integrity_metadata(state_dict, config_to_dict(self.config))

    @property
    def is_trainable(self) -> bool:
        """Integer weights have no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` takes the denoiser."""
        return True


_MISPLACED = {
    True: "config.json says that the denoiser was quantized by a {}, which does not describe one: pass "
    "it as quantization_config when loading full-precision weights",
    False: "a {} describes a denoiser that is quantized already; to quantize full-precision weights while loading, "
    "pass TorchAoConfig(dq_torchao.PlanConfig(plan))",
}


def make_savable(model: Any, config: CheckpointConfig) -> None:
    """Let ``save_pretrained`` of a denoiser that was quantized in place write it, and ``from_pretrained`` read it."""
    wrapped = TorchAoConfig(config)
    model.hf_quantizer = PlanQuantizer(wrapped, pre_quantized=True)
    model.quantization_method = wrapped.quant_method
    model.register_to_config(quantization_config=wrapped)


def _floating_dtype(files: CheckpointFiles) -> torch.dtype:
    """Dtype of most floating-point tensors that are not the quantizer's own."""
    own = ("weight_scale", "weight_sum", "act_scale", "_edges", "_bounds")
    counts: dict[torch.dtype, int] = {}
    for name, entry in files.entries.items():
        if entry.dtype.is_floating_point and not name.endswith(own):
            counts[entry.dtype] = counts.get(entry.dtype, 0) + 1
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def _devices(device_map: Any) -> tuple[Any, ...]:
    return tuple(device_map.values()) if isinstance(device_map, dict) else ()
