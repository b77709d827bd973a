"""What a plan says about one layer: its weight quantizer, its activation quantizer, or why it has none.

A quantized layer ``y = f(x, w) + b`` computes, with whatever of it the plan has,

    y = f(Q_x[g](x / balance R), Q_w((w - l) * balance R)) + f(x, l) + b + bias_correction[g]

``g`` is the timestep group of the call, ``l`` the low-rank branch.

A layer may have dynamic ranges instead of those of groups: each token of a linear layer's input, each sample of a
convolution's, is quantized by its own.

A new kind of decision about a layer is one more field of `LayerPlan` (or of a quantizer), with the default None,
``metadata=FEATURE`` and a check of its shape in ``__post_init__``. File, hash, comparison and round trip follow from
the annotation (`dq_plugins.artifact.codec`); adapters refuse plans that have it (`QuantPlan.refuse_unimplemented`)
until they name it among the features that they implement.

Shapes: ``O`` output channels (dimension 0 of the weight), ``C`` input channels (dimension 1 of the weight: those of one
group of a convolution), ``P`` groups of consecutive input channels, ``G`` timestep groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dq_plugins.affine import MAX_BITS, MIN_BITS, dequantize, fake_quantize, integer_range, per_row, quantize
from dq_plugins.artifact import STRICT, StoredTensor
from dq_plugins.errors import PlanError
from dq_plugins.layer_kinds import LAYER_KINDS
from dq_plugins.plan.brief import brief
from dq_plugins.plan.dynamic_ranges import DynamicActivationQuant
from dq_plugins.plan.low_rank import LowRank
from dq_plugins.plan.rotation import Rotation
from dq_plugins.plan.subspace import Subspace
from dq_plugins.plan.validity import code_fault, finite_fault, scale_fault, zero_point_fault
from dq_plugins.timesteps import RowOrder

FEATURE = {"feature": True}
"""Metadata of a field that changes what is computed: an adapter that does not implement it must refuse the plan."""


def _require(fault: str, what: str) -> None:
    if fault:
        raise PlanError(f"{what} {fault}")


@dataclass
class WeightQuant:
    """Weight quantizer of one layer.

    Attributes:
        bits: width of the code.
        scale: float32 ``[O]`` (per output channel) or ``[1]`` (per tensor).
        zero_point: int32, same shape, or ``[O, P]`` beside a group scale; None means symmetric.
        group_scale: uint8 ``[O, P]``, 1 or more: output o has the scale ``scale[o] * group_scale[o, p]`` for the p-th
            of P groups of its inputs. The products ``(code - zero point) * group scale`` are integers, so one integer
            product serves all groups (Lin et al. 2024, QServe). None: one group.
        codes: int8 (int16 above 8 bits) integers of the weight's shape when rounding was learned; None: nearest.
        scheme: ``"affine"``, or ``"binary"``: the codes -1 and +1 of one bit, the signs of the weight (0 counts as +1).
            Affine codes of one bit are -1 and 0.
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    bits: Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]
    scale: StoredTensor
    zero_point: StoredTensor | None = None
    codes: StoredTensor | None = None
    scheme: Literal["affine", "binary"] = "affine"
    group_scale: StoredTensor | None = None

    def __post_init__(self) -> None:
        integer_range(self.bits)
        _require(scale_fault(self.scale), "weight scale")
        self._check_groups()
        if self.scheme not in ("affine", "binary"):
            raise PlanError(f"a weight's scheme is 'affine' or 'binary', got {self.scheme!r}")
        if self.scheme == "binary" and (self.bits != 1 or self.zero_point is not None or self.codes is not None):
            raise PlanError(
                "a binary weight has one bit, no zero point and no learned codes (they are the signs of the weight); "
                f"got bits={self.bits}"
            )
        if self.zero_point is not None:
            by_group = self.group_scale is not None and self.zero_point.dim() == 2
            scale = self.group_scale if by_group and self.group_scale is not None else self.scale
            _require(zero_point_fault(self.zero_point, scale, self.bits), "weight zero point")
        if self.codes is not None:
            _require(code_fault(self.codes, self.bits), "weight codes")

    def _check_groups(self) -> None:
        if self.group_scale is None:
            return
        shape = tuple(self.group_scale.shape)
        if len(shape) != 2 or shape[0] != len(self.scale) or not shape[1] or self.group_scale.dtype != torch.uint8:
            raise PlanError(
                f"group scales of a weight are uint8 [outputs, groups]; for {len(self.scale)} outputs got "
                f"{self.group_scale.dtype} {shape}"
            )
        if not int(self.group_scale.min()):
            raise PlanError("group scales of a weight are at least 1, found 0")
        if self.scheme == "binary":
            raise PlanError("a binary weight has one scale for each output, no group scales")

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is 0."""
        return self.zero_point is None

    def steps(self, weight: Tensor) -> Tensor:
        """Scale of every value of ``weight`` (or of codes), as it broadcasts against it."""
        return self.stretched(per_row(self.scale, weight), weight)

    def stretched(self, values: Tensor, weight: Tensor) -> Tensor:
        """``values`` times the group scales, if there are any; both as they broadcast against ``weight``."""
        return values if self.group_scale is None else values * per_row(self.group_scale, weight).to(values.dtype)

    def zeros(self, weight: Tensor) -> Tensor | int:
        """Zero point of every value of ``weight``, likewise."""
        return 0 if self.zero_point is None else per_row(self.zero_point, weight)

    @property
    def rounds(self) -> bool:
        """Whether its codes come from rounding, which can be learned; signs do not."""
        return self.scheme != "binary"

    def quantize(self, weight: Tensor) -> Tensor:
        """Integer codes of ``weight`` as int8 (int16 above 8 bits), by the learned rounding or to nearest."""
        storage = torch.int8 if self.bits <= 8 else torch.int16
        if self.scheme == "binary":
            return torch.where(weight >= 0, 1, -1).to(storage)
        if self.codes is not None:
            return self.codes.to(device=weight.device, dtype=storage)
        codes = quantize(weight.float(), self.steps(weight), self.zeros(weight), *integer_range(self.bits))
        return codes.to(storage)

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """The weight the quantized layer computes with, in ``weight.dtype``."""
        codes, steps = self.quantize(weight).float(), self.steps(weight)
        if steps.requires_grad:
            return dequantize(codes, steps, self.zeros(weight)).to(weight.dtype)
        return codes.sub_(self.zeros(weight)).mul_(steps).to(weight.dtype)  # the same in one piece of memory


@dataclass
class ActivationQuant:
    """Quantizer of a layer's input: one (scale, zero point) per timestep group, per tensor.

    Attributes:
        bits: width of the code; the largest, where groups differ.
        groups: name of the timestep groups in the plan that index the table.
        scale: float32 ``[G]``.
        zero_point: int32 ``[G]``; all zero when symmetric.
        group_bits: width of the code in each group, ``[G]``, where groups differ; None among them: the input stays in
            floating point there. A narrower group uses fewer of the codes of the same kernel.
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    bits: Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]
    groups: str
    scale: StoredTensor
    zero_point: StoredTensor
    group_bits: tuple[Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)] | None, ...] | None = None

    def __post_init__(self) -> None:
        integer_range(self.bits)
        _require(scale_fault(self.scale), "activation scale")
        _require(zero_point_fault(self.zero_point, self.scale, self.bits), "activation zero point")
        if self.group_bits is not None:
            self._check_widths(self.group_bits)

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is 0."""
        return not bool(self.zero_point.any())

    def _check_widths(self, widths: tuple[int | None, ...]) -> None:
        found = [width for width in widths if width is not None]
        if len(widths) != len(self.scale) or not found or max(found) != self.bits:
            raise PlanError(
                f"group_bits are one width for each of {len(self.scale)} timestep groups, the largest of them bits="
                f"{self.bits}; got {widths}"
            )

    @property
    def widths(self) -> tuple[int | None, ...]:
        """Width of the code in each group, ``[G]``; None: floating point."""
        return (self.bits,) * len(self.scale) if self.group_bits is None else self.group_bits

    @property
    def narrowest(self) -> int:
        """The least width of any group."""
        return min(width for width in self.widths if width is not None)

    def fake_quantize(self, x: Tensor, group: int) -> Tensor:
        """Simulated quantization of ``x`` with the parameters of one group."""
        width = self.widths[group]
        if width is None:
            return x
        q_min, q_max = integer_range(width)
        return fake_quantize(x, self.scale[group].to(x.device), self.zero_point[group].to(x.device), q_min, q_max)


InputQuant = ActivationQuant | DynamicActivationQuant
"""Quantizer of a layer's input, with ranges by timestep group or by token."""


@dataclass
class BiasCorrection:
    """What is added to a layer's output to take away the mean of its error, by timestep group and output channel.

    Attributes:
        values: float32 ``[G, O]``; ``[1, O]`` without groups.
        groups: name of the timestep groups in the plan that index the table; None: one row for every timestep.
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    values: StoredTensor
    groups: str | None = None

    def __post_init__(self) -> None:
        if self.values.dim() != 2 or not self.values.numel() or self.values.dtype != torch.float32:
            raise PlanError(
                f"a bias correction is a float32 table [groups, output channels], got {self.values.dtype} of shape "
                f"{tuple(self.values.shape)}"
            )
        _require(finite_fault(self.values), "a bias correction")
        if self.groups is None and len(self.values) != 1:
            raise PlanError(f"a bias correction of {len(self.values)} rows has to name the timestep groups they are of")


ReasonCode = Literal[
    "undecided",  # no pass has chosen a quantizer for it
    "asked",  # somebody asked for the whole layer in full precision, by an option: later passes leave it so
    "weight-only",  # its input stays in floating point
    "no-input",  # it reads indices: there is no input to quantize
    "unsupported",  # it cannot be quantized
    "unused",  # the forward never runs it
    "tabulated",  # the temporal table stands in for it
    "allocated",  # its bits buy more elsewhere
    "measured",  # quantized, it would cost more of the image than it saves
    "other",
]


@dataclass(frozen=True)
class Reason:
    """Why a layer is in full precision, or a part of it.

    Attributes:
        text: for people; names the pass or the option, and what follows.
        code: for passes and reports, which never read the text.
    """

    __pydantic_config__ = STRICT

    text: str
    code: ReasonCode = "other"


UNDECIDED = Reason("no pass has chosen a quantizer for it", "undecided")
EDGE_ROLES = frozenset({"first", "last"})
"""Roles of the layers that see or make the image itself."""

NO_RANGES = Reason("activations stay in floating point: no pass has chosen their ranges", "weight-only")


@dataclass
class LayerPlan:
    """Decisions for one layer.

    Attributes:
        kind: a name of `dq_plugins.layer_kinds.LAYER_KINDS`: ``"linear"``, ``"conv2d"``, ...
        roles: what the layer is in this denoiser (``"temporal"``, ``"first"``, ``"shortcut"``, ...).
        weight: weight quantizer, or None for a full-precision weight.
        activation: quantizer of the layer's input, with ranges by timestep group, or by token for linear layers; None
            for a full-precision input.
        unquantized_reason: why something is in full precision; required while ``weight`` or ``activation`` is None.
        balance: positive float32 ``[C]``. The layer divides channel c of its input by ``balance[c]`` before it is
            quantized, and its weights for that channel are multiplied by it: exact in full precision. The weight
            quantizer (scale, codes) is that of the multiplied weight, the activation quantizer that of the divided
            input.
        rotation: R, the same for both: exact in full precision, as balance is, and after it.
        low_rank: l, a part of the weight that is left out of what is quantized, and multiplies the input as it comes;
            of linear layers, and of convolutions without groups.
        subspace: directions of the input that stay in floating point, and so does what they meet of w - l; the rest is
            balanced, rotated and quantized. Of the same layers.
        bias_correction: what is added to its output.
        rows: where the samples of a call are in its input; None: not known.
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    kind: str
    roles: frozenset[str] = field(default_factory=frozenset)
    weight: WeightQuant | None = None
    activation: InputQuant | None = None
    unquantized_reason: Reason | None = UNDECIDED
    balance: StoredTensor | None = field(default=None, metadata=FEATURE)
    bias_correction: BiasCorrection | None = field(default=None, metadata=FEATURE)
    rotation: Rotation | None = field(default=None, metadata=FEATURE)
    low_rank: LowRank | None = field(default=None, metadata=FEATURE)
    subspace: Subspace | None = field(default=None, metadata=FEATURE)
    rows: RowOrder | None = None

    def __post_init__(self) -> None:
        kind = LAYER_KINDS.get(self.kind)
        if self.dynamic and self.kind and (kind is None or kind.lookup):
            raise PlanError(
                f"dynamic ranges are for linear layers and convolutions, not for a layer of kind {self.kind!r}. Use "
                "ranges by timestep group for it."
            )
        if self.balance is not None:
            _require(scale_fault(self.balance), "balance")
        if self.bias_correction is not None and self.weight is not None:
            outputs, scales = self.bias_correction.values.shape[1], len(self.weight.scale)
            if scales not in (1, outputs):
                raise PlanError(f"the bias correction is for {outputs} output channels, the weight has {scales} scales")

    @property
    def features(self) -> tuple[str, ...]:
        """What of this entry an adapter has to implement beyond the quantizers, by field."""
        found = [f.name for f in fields(self) if f.metadata == FEATURE and getattr(self, f.name) is not None]
        widths = self.activation is not None and self.activation.group_bits is not None
        grouped = self.weight is not None and self.weight.group_scale is not None
        order = self.quantized and self.rows not in (None, "first")
        clipped = isinstance(self.activation, DynamicActivationQuant) and min(self.activation.clips) < 1
        more = {
            "dynamic_ranges": self.dynamic,
            "clipped_ranges": clipped,
            "group_widths": widths and not self.dynamic,
            "dynamic_group_widths": widths and self.dynamic,
            "group_scale": grouped,
            "row_order": order,
        }
        return (*found, *(name for name, present in more.items() if present))

    @property
    def dynamic(self) -> bool:
        """Whether the ranges of its input are measured at run time."""
        return isinstance(self.activation, DynamicActivationQuant)

    @property
    def why(self) -> str:
        """Text of the reason; empty without one."""
        return "" if self.unquantized_reason is None else self.unquantized_reason.text

    @property
    def quantized(self) -> bool:
        """Whether its weight or its input is."""
        return self.weight is not None or self.activation is not None

    @property
    def width(self) -> str:
        """Short name such as ``W8A8``, ``W8A8 dynamic``, ``W4A4/8/32`` (by group) or ``full precision``."""
        if not self.quantized:
            return "full precision"
        weight = self.weight.bits if self.weight else 32
        activation: object = 32
        if self.activation is not None:
            activation = "/".join(map(str, sorted({width or 32 for width in self.activation.widths})))
        return f"W{weight}A{activation}{' dynamic' if self.dynamic else ''}"
