"""How each layer of a quantized denoiser runs: in integers, simulated, or in full precision, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

State = Literal["integer", "simulated", "full precision"]


@dataclass(frozen=True)
class Execution:
    """How one layer runs.

    Attributes:
        state: ``"integer"``: integer weights times integer activations; ``"simulated"``: the values of the quantized
            layer, computed in floating point; ``"full precision"``: untouched.
        width: what the plan asks for, such as ``W8A8``.
        kernel: what multiplies, such as ``"onednn.qlinear_pointwise"``.
        compute: dtypes of the multiplication, such as ``"uint8 x int8 -> int32"``.
        reason: why it does not run in integers, or what decided that it does; may be empty.
    """

    state: State
    width: str
    kernel: str
    compute: str
    reason: str = ""


def execution_report(model: nn.Module) -> dict[str, Execution]:
    """How every planned layer of ``model`` runs, by fully qualified name.

    Args:
        model: a denoiser that `dq_torchao.apply` or ``quantize_`` has converted.

    Returns:
        One entry for each layer of the plan, in the order of the modules; empty for another model.
    """
    found = ((name, getattr(module, "execution", None)) for name, module in model.named_modules())
    return {name: execution for name, execution in found if isinstance(execution, Execution)}
