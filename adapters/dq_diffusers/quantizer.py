"""diffusers' ``save_pretrained`` and ``from_pretrained`` for denoisers that dq_torchao quantizes.

diffusers finds a quantizer by the method name of the config; ours is ``dq``, registered by `dq_diffusers.registration`.

On disk a quantized denoiser is what diffusers writes: ``config.json`` with a ``quantization_config``, and safetensors,
sharded or not. Loading:

- ``from_pretrained(folder)`` of a quantized denoiser restores it bit for bit;
- ``from_pretrained(folder, quantization_config=DQConfig("plan/"))`` of a full-precision denoiser quantizes it when its
  weights are there, and checks that they are the plan's;
- ``DQConfig(config=TimestepInt8Config())`` prepares the denoiser for calibration by sampling.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.quantizers.base import DiffusersQuantizer
from dq_torchao import linear_and_conv2d
from dq_torchao.adapter import apply
from dq_torchao.checkpoint import finish, rebuild
from dq_torchao.checkpoint_config import CheckpointConfig, checkpoint_config_of, require_unreplaced
from dq_torchao.checkpoint_files import CheckpointFiles, check_readable, integrity_metadata
from dq_torchao.plan_config import PlanConfig
from torch import Tensor, nn
from torchao.core.config import config_to_dict
from torchao.quantization import quantize_

from dq_diffusers.config import DQConfig
from dq_diffusers.dtypes import cast_unsaved, main_dtype, noted_dtypes
from dq_plugins.errors import CheckpointError, DQError
from dq_plugins.full_precision import SAVE_FIRST, require_values

FUSED_PROJECTIONS = frozenset({"to_qkv", "to_kv", "to_added_qkv"})
"""What ``fuse_qkv_projections`` calls the layers that it adds."""

IP_ADAPTERS = (".processor.to_k_ip.", "image_projection_layers.")
"""What tells tensors of IP-Adapters apart."""

logger = logging.getLogger(__name__)


class DQQuantizer(DiffusersQuantizer):
    """Loads and saves denoisers whose quantization config is a `DQConfig`."""

    requires_calibration = False
    required_packages = ("torchao",)
    use_keep_in_fp32_modules = True

    quantization_config: DQConfig

    def __init__(self, quantization_config: DQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        saved = isinstance(quantization_config.config, CheckpointConfig)
        if saved and not self.pre_quantized:
            raise DQError(
                "the record of a denoiser that is quantized already cannot quantize full-precision weights: pass "
                "quantization_config=dq_diffusers.DQConfig(plan)"
            )
        self.pre_quantized = saved  # loading of single files says so of everything
        self.files: CheckpointFiles | None = None
        self.full_precision = False  # the weights are, whatever the config says
        self.modules: frozenset[str] | None = None  # names of those of a quantized denoiser
        self.exact: frozenset[str] = frozenset()
        self.dtype_given = False

    @property
    def config(self) -> Any:
        """The config of dq_torchao."""
        return self.quantization_config.config

    # Loading, in the order in which from_pretrained calls

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work before anything is read."""
        if kwargs.get("device_map") == "disk" or "disk" in _devices(kwargs.get("device_map")):
            raise DQError("quantized denoisers cannot be offloaded to disk while loading; leave device_map out")

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype asked for; without one a quantized denoiser is built in the dtype it was quantized in."""
        self.dtype_given = torch_dtype is not None
        noted = self.quantization_config.dtypes.get("") if self.pre_quantized else None
        return getattr(torch, noted) if torch_dtype is None and noted is not None else torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """The files are known here: nothing but safetensors, and a quantized checkpoint is verified."""
        folders = sorted({str(Path(file).parent) for file in checkpoint_files})
        if len(folders) > 1:
            raise CheckpointError(f"the files of one checkpoint lie beside each other, and these are in {folders}")
        if not self.pre_quantized:
            check_readable(checkpoint_files)
            return loaded_keys
        self.files = CheckpointFiles(checkpoint_files)
        self.full_precision = self.files.full_precision
        if self.full_precision:
            logger.warning(
                "%s holds full-precision weights, and the config of a quantized denoiser: a denoiser made from its "
                "config was saved there. It is loaded in full precision.",
                folders[0],
            )
        else:
            self.files.verify(config_to_dict(self.config))
        return loaded_keys

    def preprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """As in the base class, but a denoiser of ours may be cast, so it is not marked as one that may not."""
        model.quantization_method = self.quantization_config.quant_method
        return self._process_model_before_weight_loading(model, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized or self.full_precision:
            return model
        assert self.files is not None
        _fuse_as_saved(model, self.files.entries)
        plain = set(model.state_dict())
        if not self.dtype_given:
            main = main_dtype({name: entry.dtype for name, entry in self.files.entries.items()})
            cast_unsaved(model, self.quantization_config.dtypes, main)
        rebuild(model, self.config, self.files.entries)
        expected = model.state_dict()
        self.files.check(expected)
        self.exact = frozenset(set(expected) - plain)
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether the tensor is loaded as it is, instead of in the dtype that diffusers chooses."""
        if self.full_precision:
            return False
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
        is_parameter = isinstance(getattr(module, name), nn.Parameter)
        setattr(module, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)

    def _process_model_after_weight_loading(self, model: Any) -> Any:
        if self.full_precision:
            return model
        if isinstance(self.config, CheckpointConfig):
            finish(model, self.config)
        elif isinstance(self.config, PlanConfig):
            apply(model, self.config.resolve(), **self.config.options())
        else:
            quantize_(model, self.config, filter_fn=linear_and_conv2d)
        if checkpoint_config_of(model) is not None:  # it is quantized now, and `make_savable` has said how
            noted = self.quantization_config.dtypes
            self.quantization_config = model.config["quantization_config"]
            if self.pre_quantized and not self.dtype_given:
                self.quantization_config.dtypes = noted  # those of the denoiser that was saved
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
            DQError: a pickle was asked for, or modules were added after the denoiser was quantized.
        """
        if not safe_serialization:
            raise DQError(
                "save_pretrained(safe_serialization=False) writes a pickle, and quantized denoisers are not read from "
                "pickles, because reading one can run code. Leave the argument out."
            )
        if self.full_precision:
            return state_dict, {}
        if adapters := [name for name in state_dict if any(part in name for part in IP_ADAPTERS)]:
            raise DQError(
                f"the denoiser has an IP-Adapter ({adapters[0]!r} and {len(adapters) - 1} other tensors), and a config "
                "of diffusers has no place for one: from_pretrained could not build it again. Save with "
                "dq_torchao.save(denoiser, folder), build the full-precision denoiser with its adapter, and "
                "dq_torchao.load(denoiser, folder); or take it off (pipe.unload_ip_adapter()), save, and load it again"
            )
        metadata = integrity_metadata(state_dict, config_to_dict(self.config))
        owners = {name.rpartition(".")[0] for name in state_dict}
        if self.modules is not None and (added := sorted(owners - self.modules)):
            raise DQError(
                f"the denoiser has {len(added)} modules that it did not have when it was quantized, the first is "
                f"{added[0]!r}: a loaded one would have no place for them. Fuse projections and load adapters before "
                "quantizing, or save the denoiser first and do it again after loading."
            )
        return state_dict, metadata

    @property
    def is_trainable(self) -> bool:
        """Integer weights have no gradients."""
        return self.full_precision

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` takes the denoiser."""
        return True


def make_savable(model: Any, config: CheckpointConfig) -> None:
    """Let ``save_pretrained`` of a denoiser that was quantized in place write it, and ``from_pretrained`` read it."""
    if not isinstance(model, ModelMixin) or not hasattr(model, "config"):
        return  # one of several nets has no config of its own, and diffusers saves each of them by itself
    if getattr(getattr(model, "hf_quantizer", None), "modules", None) is None:  # not here before
        # a quantizer sees the state alone, in which what lies on disk is memory that nobody has written to
        model.register_state_dict_pre_hook(partial(_require_savable, fused=_fused(model)))
    wrapped = DQConfig(config=config, dtypes=noted_dtypes(model))
    wrapped.note_step_policy(model)
    model.hf_quantizer = DQQuantizer(wrapped, pre_quantized=True)
    model.hf_quantizer.modules = frozenset(name for name, _ in model.named_modules())
    model.quantization_method = wrapped.quant_method
    # a new config forgets attributes that were set on the old one, as loading an IP-Adapter does
    set_later = {name: value for name, value in vars(model.config).items() if model.config.get(name) is not value}
    model.register_to_config(quantization_config=wrapped)
    for name in set_later.keys() & model.config.keys():
        setattr(model.config, name, set_later[name])


def _require_savable(model: nn.Module, *_: Any, fused: frozenset[str] = frozenset()) -> None:
    require_values(model, SAVE_FIRST, DQError)
    require_unreplaced(model)
    if separate := sorted(fused - _fused(model)):
        raise DQError(
            "the projections of attention were fused when the denoiser was quantized, and are not now "
            f"({separate[0]!r} and {len(separate) - 1} others): "
            "what is quantized does not run, and a loaded denoiser would be fused. Load the quantized denoiser again, "
            "or quantize the full-precision one without fusing them"
        )


def _fused(model: nn.Module) -> frozenset[str]:
    """What computes with fused projections: processors of attention made for it, or modules that hold the layers."""
    processors = getattr(model, "attn_processors", {}).items()
    made_for_it = {name for name, processor in processors if "Fused" in type(processor).__name__}
    return made_for_it | {name for name, _ in model.named_modules() if name.rpartition(".")[2] in FUSED_PROJECTIONS}


def _devices(device_map: Any) -> tuple[Any, ...]:
    return tuple(device_map.values()) if isinstance(device_map, dict) else ()


def _fuse_as_saved(model: Any, saved: Iterable[str]) -> None:
    """Fuse the projections of attention where those of the saved denoiser were."""
    modules = {name for name, _ in model.named_modules()}
    added = {name.split(".")[-2] for name in saved if name.rpartition(".")[0] not in modules and "." in name}
    if added & FUSED_PROJECTIONS and hasattr(model, "fuse_qkv_projections"):
        model.fuse_qkv_projections()
