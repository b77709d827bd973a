"""Weights that a layer holds as packed codes of 1 to 8 bits, in memory as in its state dict.

`PackedWeight` is what every quantized layer shares. On its own it makes a layer that computes in floating point: its
``weight`` is dequantized at each call and forgotten, so a 4-bit weight costs half a byte a value at all times.

    w^ = (s_w u (w - z_w)) R^T / balance        per entry of dimension 0 and input channel, w the codes

Shapes: ``O`` entries of dimension 0 of the weight (its outputs; the inputs of a transposed convolution, whose scales
are all the same), ``C`` input channels, ``P`` groups of them with scales u of their own, n values, ``B`` =
ceil(n bits / 8) bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import new_class
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from typing_extensions import Self

from dq_plugins.affine import per_row
from dq_plugins.errors import DQError
from dq_plugins.layer_kinds import LAYER_KINDS, LayerKind, exact_kind, kind_of, mixed_in
from dq_plugins.lookalike import Lookalike, Maker, known_lookalike
from dq_plugins.plan import LowRank, WeightQuant
from dq_plugins.plan.low_rank import thin_product
from dq_plugins.quantized.code_widths import WithWidths
from dq_plugins.quantized.exact_state import ExactState
from dq_plugins.quantized.layer_transform import LayerTransform, transformed_weight
from dq_plugins.quantized.packing import pack_bits
from dq_plugins.quantized.rotate import Rotate
from dq_plugins.quantized.split import Split
from dq_torchao.kernels import unpack_codes
from dq_torchao.wrapped_forward import exchange

MAX_BITS = 8


class PackedWeight(WithWidths):
    """A layer whose weight is bit-packed. Made in place of the floating-point layer (`in_place_of`).

    Attributes:
        weight_packed: uint8 ``[B]``, see `dq_plugins.quantized.packing`.
        weight_scale: float32 ``[O]``.
        weight_zero_point: int32 ``[O]``, or ``[O, P]`` in groups; None when symmetric.
        weight_group_scale: uint8 ``[O, P]``; None without groups.
        weight_shape: shape of the weight.
        weight_bits: width of the codes.
        weight_signs: whether the codes are -1 and +1 (one bit).
        weight_dtype: floating-point dtype of the weight; follows casts of the layer.
        inverse_balance: float32, one over the plan's balance, as it broadcasts against the layer's input (``[C]``, or
            ``[C, 1, 1]`` for a 2-d convolution); None without one. The codes are those of the weight times the balance.
        input_rotation: R, of the divided channels; None without one.
        low_rank_down: float16 ``[r, K]``, or codes of int8, of the low-rank branch beside the quantized weight; None
            without one.
        low_rank_up: ``[O, r]``, likewise.
        low_rank_scale: float32 ``[r]``, of the codes; None without them.
        input_split: takes out directions of the input that stay in floating point; None without any.
        kept_weight: float16 ``[O, r, *kernel]``, what they meet; None likewise.
    """

    exact_state = ("weight_scale", "inverse_balance", "low_rank_down", "low_rank_up", "low_rank_scale", "kept_weight")

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_group_scale: Tensor | None
    weight_shape: tuple[int, ...]
    weight_bits: int
    weight_signs: bool
    weight_dtype: torch.dtype
    inverse_balance: Tensor | None
    input_rotation: Rotate | None
    low_rank_down: Tensor | None
    low_rank_up: Tensor | None
    low_rank_scale: Tensor | None
    input_split: Split | None
    kept_weight: Tensor | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Called with arguments, the floating-point layer that it stands for.

        Layers of these classes are made in place. Tools that want another layer of the same kind, as LoRA does for its
        branches, call ``type(layer)(...)``, and do not want a quantized one.
        """
        if not (args or kwargs):
            return super().__new__(cls)  # a copy, or a pickle being read
        plain = next(base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, ExactState))
        return plain(*args, **kwargs)

    @classmethod
    @torch.no_grad()
    def in_place_of(cls, layer: nn.Module, quant: WeightQuant, transform: LayerTransform | None = None) -> Self:
        """Turn a floating-point layer into one of this class, its weight packed as ``quant`` says.

        Args:
            layer: the layer.
            quant: quantizer of its weight, as it is transformed.
            transform: of its input.

        Returns:
            The same object: references to the layer, its position in the denoiser, its hooks and what wraps its forward
            stay as they are.
        """
        own = layer.weight
        assert isinstance(own, Tensor)
        weight = transformed_weight(layer, transform).detach()
        kept = None if transform is None else transform.kept(own.detach())
        del layer.weight
        former, layer.__class__ = type(layer), cls
        assert isinstance(layer, cls)
        exchange(layer, former)
        layer._store(quant, weight, own.dtype)
        balance = None if transform is None else transform.balance
        inverse = None if balance is None else layer._kind.per_output(balance.to(weight.device).reciprocal())
        layer.register_buffer("inverse_balance", inverse)
        branch = None if transform is None else transform.low_rank
        for part in ("down", "up", "scale"):
            held = None if branch is None else getattr(branch, part)
            layer.register_buffer(f"low_rank_{part}", None if held is None else held.to(weight.device, copy=True))
        rotate = None if transform is None else transform.rotate
        layer.register_module("input_rotation", None if rotate is None else copy.deepcopy(rotate).to(weight.device))
        split = None if transform is None else transform.split
        layer.register_module("input_split", None if split is None else copy.deepcopy(split).to(weight.device))
        layer.register_buffer("kept_weight", kept)
        return layer

    def _store(self, quant: WeightQuant, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight_shape, self.weight_dtype = tuple(weight.shape), dtype
        self.weight_bits, self.weight_signs = quant.bits, quant.scheme == "binary"
        self.state_widths([quant.bits, self.weight_signs], weight.device)
        self.register_buffer("weight_packed", self._pack(quant.quantize(weight)))
        self.register_buffer("weight_scale", self._per_output(quant.scale, torch.float32))
        zero_point = None if quant.zero_point is None else self._per_output(quant.zero_point, torch.int32)
        self.register_buffer("weight_zero_point", zero_point)
        groups = None if quant.group_scale is None else self._per_output(quant.group_scale, torch.uint8)
        self.register_buffer("weight_group_scale", groups)

    def _pack(self, codes: Tensor) -> Tensor:
        return pack_bits(codes, self.weight_bits, signs=self.weight_signs)

    def _per_output(self, parameters: Tensor, dtype: torch.dtype) -> Tensor:
        return (
            parameters.to(self.weight_packed.device, dtype).expand(self.weight_shape[0], *parameters.shape[1:]).clone()
        )

    @property
    def _kind(self) -> LayerKind:
        kind = kind_of(self)
        assert kind is not None
        return kind

    @property
    def weight_codes(self) -> Tensor:
        """The codes, unpacked at every call: int8 of the weight's shape."""
        return unpack_codes(self.packed_weight(), self.weight_shape, self.weight_bits, self.weight_signs)

    def packed_weight(self) -> Tensor:
        """The packed codes, wherever they are: uint8 ``[B]``."""
        return self.weight_packed

    @property
    def weight(self) -> Tensor:
        """The weight this layer computes with, as a new floating-point tensor."""
        weight = self.weight_codes.float()
        if self.weight_zero_point is not None:
            weight -= per_row(self.weight_zero_point, weight)
        if self.weight_group_scale is not None:
            weight *= per_row(self.weight_group_scale, weight)
        weight *= per_row(self.weight_scale, weight)
        if self.input_rotation is not None:
            weight = self.input_rotation(weight, 1, inverse=True)
        if self.inverse_balance is not None:
            weight *= self._kind.per_input(self.inverse_balance.flatten(), weight)
        beside = self.__dict__.get("input_beside")
        branch = self.kept_weight if beside == "inside" else self._branch(weight)
        if branch is not None and beside is not None:  # the layer gets its input, or what is inside of a split, as well
            return derived(torch.cat([weight, branch.to(weight)], 1).to(self.weight_dtype))
        if self.input_split is not None:
            weight = self.input_split.outside(weight, 1)
        return derived((weight if branch is None else weight + branch).to(self.weight_dtype))

    def _branch(self, like: Tensor) -> Tensor | None:
        """What meets the input as it comes, float32, in the shape of the weight; None without anything."""
        branch = None
        if self.low_rank_down is not None and self.low_rank_up is not None:
            branch = thin_product(self.low_rank_down, self.low_rank_up, like, self.low_rank_scale)
        if self.input_split is not None and self.kept_weight is not None:
            kept = self.input_split.spread(self.kept_weight.to(like))
            branch = kept if branch is None else branch + kept
        return branch

    @property
    def low_rank(self) -> LowRank | None:
        """The low-rank branch."""
        if self.low_rank_down is None or self.low_rank_up is None:
            return None
        return LowRank(self.low_rank_down, self.low_rank_up, self.low_rank_scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.weight_scale.device)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """That of the floating-point layer, and the width."""
        return f"{super().extra_repr()}, W{self.weight_bits}"


PACKED_LAYERS = mixed_in(PackedWeight, "Packed", LAYER_KINDS.values())
"""Packed counterpart of PyTorch's layer classes, computed in floating point; an embedding has one scale a row."""


class _Counterpart(Lookalike):
    """First base of the counterparts of subclasses."""


def counterpart(
    original: type[nn.Module], plain: type[nn.Module], quantized: type[PackedWeight], made_by: Maker
) -> type[PackedWeight]:
    """The class of a quantized layer that was of the class ``original``; always the same one.

    Args:
        original: PyTorch's class, or a subclass that keeps its arithmetic: the result is one, too, so that the code
            around the layer finds what it expects of it.
        plain: PyTorch's class.
        quantized: its counterpart.
        made_by: see `dq_plugins.lookalike.lookalike`.
    """
    if original is plain:
        return quantized
    known = known_lookalike(original, made_by)
    if known is None:
        names = {name: getattr(quantized, name) for name in ("__module__", "__qualname__", "__doc__")}
        names |= {"_dq_original": original, "_dq_made_by": staticmethod(made_by)}
        bases = (_Counterpart, quantized, original)
        known = new_class(quantized.__name__, bases, {}, lambda body: body.update(names))
    assert issubclass(known, PackedWeight)
    return known


def packed_class(original: type[nn.Module]) -> type[PackedWeight]:
    """The class of a packed layer that was of the class ``original`` (one for which `exact_kind` holds)."""
    plain = next(each for each in original.__mro__ if each in PACKED_LAYERS)
    return counterpart(original, plain, PACKED_LAYERS[plain], packed_class)


def can_pack(layer: nn.Module, quant: WeightQuant | None) -> bool:
    """Whether ``layer`` can hold its weight packed and compute in floating point."""
    # an embedding with a largest norm changes its own weight as it runs
    fixed = getattr(layer, "max_norm", None) is None
    return quant is not None and quant.bits <= MAX_BITS and exact_kind(layer) is not None and fixed


def pack_layer(layer: nn.Module, quant: WeightQuant, transform: LayerTransform | None = None) -> PackedWeight:
    """Pack the weight of ``layer``, in place.

    Args:
        layer: one that `can_pack` holds for.
        quant: its weight quantizer, at most 8 bits.
        transform: of its input where that is quantized.

    Returns:
        The same object, of the packed class.
    """
    return packed_class(type(layer)).in_place_of(layer, quant, transform)


class DerivedWeight(Tensor):
    """A tensor like any other, except that its ``data`` cannot be replaced. Results of operations are plain tensors.

    Tools that merge something into a weight (LoRA's ``fuse_lora``, weight averaging) read ``layer.weight`` and assign
    to its ``data``. A dequantized weight is a new tensor at every access, so the change would be lost without a word.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """The values as a plain tensor."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> NoReturn:
        raise DQError(
            "the weight of a quantized layer is packed, and what is read from it is a copy, so nothing can be merged "
            "into it. Merge (fuse_lora) into the full-precision denoiser and quantize that, leave the adapter beside "
            "the quantized layers, where it works unmerged, or make it part of their low-rank branches: "
            "dq_torchao.merge_lora(denoiser)."
        )


def derived(weight: Tensor) -> Tensor:
    """``weight``, guarded; in a graph that is being compiled, as it is: nothing is assigned there."""
    return weight if torch.compiler.is_compiling() else weight.as_subclass(DerivedWeight)
