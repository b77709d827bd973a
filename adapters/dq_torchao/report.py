"""How each layer of a quantized denoiser runs, and why; what its weight takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor, nn

from dq_plugins.artifact import STRICT
from dq_plugins.errors import PlanError
from dq_torchao.packed_weight import PackedWeight
from dq_torchao.wrapped_forward import unreachable

State = Literal["integer", "weight-only", "simulated", "full precision"]


class Timing(NamedTuple):
    """Milliseconds that the calls of one layer take in one forward of the denoiser."""

    integer: float
    floating: float

    @property
    def integer_pays(self) -> bool:
        """Whether the integer form is faster."""
        return self.integer < self.floating

    def __str__(self) -> str:
        faster, slower = sorted((self.integer, self.floating))
        form = "integers are" if self.integer_pays else "floating point is"
        return f"{form} faster here: {faster:.3f} ms against {slower:.3f} ms"


@dataclass(frozen=True)
class Execution:
    """How one layer runs.

    Attributes:
        state: ``"integer"``: integer weights times integer activations; ``"weight-only"``: the weight is stored in
            integers, the input is floating point, and so is the product; ``"simulated"``: the values of the quantized
            layer, input included, computed in floating point; ``"full precision"``: untouched.
        width: what the plan asks for, such as ``W8A8``.
        kernel: what multiplies, such as ``"onednn.qlinear_pointwise"``.
        compute: dtypes of the multiplication, such as ``"uint8 x int8 -> int32"``.
        reason: why it does not run in integers, or what decided that it does; may be empty.
        bits: what one value of the weight takes, in memory and in the state dict.
        bytes: what the weight takes, without scales.
        scale_bytes: what scales (of groups of inputs too), zero points, balance, rotation, what stays in
            floating point beside it, and bias correction take, those of the activations included.
    """

    __pydantic_config__ = STRICT

    state: State
    width: str
    kernel: str
    compute: str
    reason: str = ""
    bits: int = 0
    bytes: int = 0
    scale_bytes: int = 0

    def stored_by(self, layer: nn.Module) -> Execution:
        """The same, with what the weight of ``layer`` takes."""
        if isinstance(layer, PackedWeight):
            bits, size = layer.weight_bits, layer.weight_packed.nbytes
        elif isinstance(weight := getattr(layer, "weight", None), Tensor):
            bits, size = 8 * weight.element_size(), weight.nbytes
        else:
            return self
        return replace(self, bits=bits, bytes=size, scale_bytes=_bytes_of_scales(layer))


def _bytes_of_scales(layer: nn.Module) -> int:
    """Bytes of everything in the state dict whose name says so."""
    suffixes = (
        "low_rank_down",
        "low_rank_up",
        "basis",
        "kept_weight",
        "matrix",
        "scale",
        "zero_point",
        "balance",
        "bias_correction",
        "output_correction.values",
    )
    return sum(value.nbytes for name, value in layer.state_dict().items() if name.endswith(suffixes))


def execution_report(model: nn.Module) -> dict[str, Execution]:
    """How every planned layer and every planned attention of ``model`` runs, by fully qualified name.

    Args:
        model: a denoiser that `dq_torchao.apply` or ``quantize_`` has converted.

    Returns:
        One entry for each of the plan, in the order of the modules; empty for another model.

    Raises:
        PlanError: the model was loaded with a config of ours, and whoever loaded it never applied that.
    """
    found = ((name, module, getattr(module, "execution", None)) for name, module in model.named_modules())
    report = {name: _as_it_runs(module, how) for name, module, how in found if isinstance(how, Execution)}
    loaded_with = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    config = getattr(loaded_with, "quant_type", None)
    if not report and type(config).__module__.split(".")[0] == __package__:
        raise PlanError(
            f"this {type(model).__name__} is in full precision: it was loaded with a {type(loaded_with).__name__} that "
            f"holds a {type(config).__name__}, and the loader applied no config (from_single_file applies none of "
            "torchao's). Load it without a config and call dq_torchao.apply(model, plan)"
        )
    return report


def _as_it_runs(layer: nn.Module, execution: Execution) -> Execution:
    """A tool may have replaced the forward of an integer layer since; its weight is then used in floating point."""
    if execution.state != "integer" or not isinstance(layer, PackedWeight) or not (reason := unreachable(layer)):
        return execution
    dtype = str(getattr(layer, "weight_dtype", "")).removeprefix("torch.")
    return replace(execution, state="weight-only", kernel="", compute=dtype, reason=reason)
