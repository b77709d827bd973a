"""The widths of codes as part of a state dict, so that a state of other widths is refused instead of misread."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dq_plugins.errors import DQError
from dq_plugins.plan import ActivationQuant, InputQuant
from dq_plugins.quantized.exact_state import ExactState

NAME = "code_widths"


class OfQuantizedLayer(dict[str, Any]):
    """What a state dict notes of a quantized layer. A layer of another kind that reads it is told what it holds.

    Copies and pickles of a state dict have an ordinary dictionary in its place.
    """

    def get(self, key: str, default: Any = None) -> Any:
        """Raises `DQError`: `WithWidths` does not ask."""
        raise DQError(
            "this is the state of a quantized layer, to be loaded into one that is not: its weight is packed. "
            "What copies weights from one model into another (ControlNetModel.from_unet, UNetMotionModel.from_unet2d, "
            "load_state_dict) wants the full-precision denoiser: do it first, and quantize then"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())

    def __deepcopy__(self, memo: Any) -> OrderedDict[str, Any]:
        return OrderedDict(self)


class WithWidths(ExactState):
    """A module whose tables and codes mean something at certain widths only.

    Attributes:
        code_widths: int8 ``[n]``: whatever tells its widths and forms apart.
    """

    code_widths: Tensor

    def state_widths(self, widths: Iterable[int], device: torch.device) -> None:
        """Say which widths the state of this module is for."""
        self._widths = list(widths)  # what the module is built for, whatever the buffer holds (`Module.to_empty`)
        self.register_buffer(NAME, torch.tensor(self._widths, dtype=torch.int8, device=device))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        notes = getattr(destination, "_metadata", None)
        if notes is not None:
            notes[prefix[:-1]] = OfQuantizedLayer(notes.get(prefix[:-1], {}))

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = state_dict.get(prefix + NAME)
        if isinstance(found, Tensor) and not found.is_meta and found.tolist() != self._widths:
            error_msgs.append(
                f"{prefix.rstrip('.')}: the state is of a layer with other widths, {found.tolist()} instead of "
                f"{self._widths}. Apply the plan that the state was made with, then load it."
            )
            return
        if found is None and f"{prefix}weight" in state_dict and "weight" not in self._parameters:
            error_msgs.append(
                f"{prefix.rstrip('.')}: the state is of a full-precision layer, and this one holds integers. Load it "
                "into the full-precision denoiser, and quantize that."
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, dict(local_metadata), strict, missing_keys, unexpected_keys, error_msgs
        )


def input_widths(quant: InputQuant) -> list[int]:
    """What tells the quantizers of inputs apart: the width in each group (0: floating point), or those of tokens."""
    if isinstance(quant, ActivationQuant):
        return [0 if width is None else width for width in quant.widths]
    return [*quant.widths, -1 if quant.symmetric else -2]
