"""What a plan says about one layer: its weight quantizer, its activation quantizer, or why it has none.

Shapes: ``O`` output channels (dimension 0 of the weight), ``G`` timestep groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dq_plugins.affine import dequantize, fake_quantize, integer_range, quantize
from dq_plugins.errors import PlanError


def _per_channel(parameters: Tensor, weight: Tensor) -> Tensor:
    """View ``[O]`` (or ``[1]``) parameters so that they broadcast against a weight ``[O, ...]``."""
    return parameters.reshape(-1, *[1] * (weight.dim() - 1)).to(weight.device)


def _finite_positive(scale: Tensor, what: str) -> None:
    if scale.dim() != 1 or scale.numel() == 0:
        raise PlanError(f"{what} scale must have one dimension and an entry, got shape {tuple(scale.shape)}")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise PlanError(f"{what} scale must be finite and positive, found {scale.min():g} .. {scale.max():g}")


@dataclass
class WeightQuant:
    """Weight quantizer of one layer.

    Attributes:
        bits: width of the code.
        scale: float32 ``[O]`` (per output channel) or ``[1]`` (per tensor).
        zero_point: int32, same shape; None means symmetric.
        codes: int8 (int16 above 8 bits) integers of the weight's shape when rounding was learned; None: nearest.
        scheme: ``"affine"``, or ``"binary"``: the codes -1 and +1 of one bit, the signs of the weight (0 counts as +1).
            Affine codes of one bit are -1 and 0.
    """

    bits: int
    scale: Tensor
    zero_point: Tensor | None = None
    codes: Tensor | None = None
    scheme: Literal["affine", "binary"] = "affine"

    def __post_init__(self) -> None:
        q_min, q_max = integer_range(self.bits)
        _finite_positive(self.scale, "weight")
        if self.scheme not in ("affine", "binary"):
            raise PlanError(f"a weight's scheme is 'affine' or 'binary', got {self.scheme!r}")
        if self.scheme == "binary" and (self.bits != 1 or self.zero_point is not None or self.codes is not None):
            raise PlanError(
                "a binary weight has one bit, no zero point and no learned codes (they are the signs of the weight); "
                f"got bits={self.bits}"
            )
        if self.zero_point is not None and self.zero_point.shape != self.scale.shape:
            raise PlanError(
                f"weight zero point has shape {tuple(self.zero_point.shape)}, scale {tuple(self.scale.shape)}"
            )
        if self.codes is not None and (int(self.codes.min()) < q_min or int(self.codes.max()) > q_max):
            raise PlanError(f"weight codes must lie in [{q_min}, {q_max}] at {self.bits} bits")

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is 0."""
        return self.zero_point is None

    @property
    def rounds(self) -> bool:
        """Whether its codes come from rounding, which can be learned; signs do not."""
        return self.scheme != "binary"

    def integers(self, weight: Tensor) -> Tensor:
        """Integer codes of ``weight`` as int8 (int16 above 8 bits), by the learned rounding or to nearest."""
        storage = torch.int8 if self.bits <= 8 else torch.int16
        if self.scheme == "binary":
            return torch.where(weight >= 0, 1, -1).to(storage)
        if self.codes is not None:
            return self.codes.to(device=weight.device, dtype=storage)
        zero_point = 0 if self.zero_point is None else _per_channel(self.zero_point, weight)
        codes = quantize(weight.float(), _per_channel(self.scale, weight), zero_point, *integer_range(self.bits))
        return codes.to(storage)

    def fake(self, weight: Tensor) -> Tensor:
        """The weight the quantized layer computes with, in ``weight.dtype``."""
        zero_point = 0 if self.zero_point is None else _per_channel(self.zero_point, weight)
        return dequantize(self.integers(weight).float(), _per_channel(self.scale, weight), zero_point).to(weight.dtype)


@dataclass
class ActivationQuant:
    """Quantizer of a layer's input: one (scale, zero point) per timestep group, per tensor.

    Attributes:
        bits: width of the code.
        groups: name of the timestep groups in the plan that index the table.
        scale: float32 ``[G]``.
        zero_point: int32 ``[G]``; all zero when symmetric.
    """

    bits: int
    groups: str
    scale: Tensor
    zero_point: Tensor

    def __post_init__(self) -> None:
        integer_range(self.bits)
        _finite_positive(self.scale, "activation")
        if self.zero_point.shape != self.scale.shape:
            raise PlanError(
                f"activation zero point has shape {tuple(self.zero_point.shape)}, scale {tuple(self.scale.shape)}"
            )

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is 0."""
        return not bool(self.zero_point.any())

    def fake(self, x: Tensor, group: int) -> Tensor:
        """Simulated quantization of ``x`` with the parameters of one group."""
        q_min, q_max = integer_range(self.bits)
        return fake_quantize(x, self.scale[group].to(x.device), self.zero_point[group].to(x.device), q_min, q_max)


@dataclass
class LayerPlan:
    """Decisions for one layer.

    Attributes:
        kind: ``"linear"``, ``"conv2d"``, ...
        roles: what the layer is in this denoiser (``"temporal"``, ``"first"``, ``"shortcut"``, ...).
        weight: weight quantizer, or None for a full-precision weight.
        activation: quantizer of the layer's input, or None for a full-precision input.
        kept: why something is in full precision; required while ``weight`` or ``activation`` is None.
    """

    kind: str
    roles: frozenset[str] = field(default_factory=frozenset)
    weight: WeightQuant | None = None
    activation: ActivationQuant | None = None
    kept: str | None = "no pass has chosen a quantizer for it"

    @property
    def quantized(self) -> bool:
        """Whether its weight or its input is."""
        return self.weight is not None or self.activation is not None

    @property
    def width(self) -> str:
        """Short name such as ``W8A8``, ``W4A16`` or ``full precision``."""
        if not self.quantized:
            return "full precision"
        weight = self.weight.bits if self.weight else 32
        return f"W{weight}A{self.activation.bits if self.activation else 32}"
