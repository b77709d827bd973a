"""Weight quantizers: one scale per output channel, by min-max or by an error-minimising shrink search.

Source: the shrink search is the scale initialisation of Q-Diffusion / BRECQ: shrink the min-max range in steps of
1 % and keep the one with the lowest mean ``|w - w^|^p``, p = 2.4.

Shapes: weight ``[O, ...]``, scale ``[O]``. Errors are accumulated in float32 over one channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dq_plugins.affine import affine_parameters, fake_quantize, integer_range
from dq_plugins.errors import PlanError
from dq_plugins.plan import QuantPlan, WeightQuant
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress

SHRINK_STEPS, SHRINK, ERROR_POWER = 80, 0.01, 2.4


def _per_channel_error(flat: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    scale, zero_point = affine_parameters(low, high, bits, symmetric=symmetric)
    fake = fake_quantize(flat, scale[:, None], zero_point[:, None], *integer_range(bits))
    return (flat - fake).abs().pow(ERROR_POWER).mean(1)


def weight_parameters(
    weight: Tensor, bits: int, *, symmetric: bool = True, method: Literal["minmax", "shrink"] = "shrink"
) -> tuple[Tensor, Tensor]:
    """Scale and zero point per output channel.

    Args:
        weight: ``[O, ...]``.
        bits: width of the code.
        symmetric: zero point fixed at 0.
        method: ``"minmax"``, or ``"shrink"`` for the search described at the top of this file.

    Returns:
        ``(scale, zero_point)``, float32 and int32 ``[O]``.
    """
    flat = weight.detach().float().flatten(1)
    low, high = flat.amin(1).clamp(max=0), flat.amax(1).clamp(min=0)
    if method == "minmax":
        return affine_parameters(low, high, bits, symmetric=symmetric)
    best = torch.full_like(low, torch.inf)
    ratio = torch.ones_like(low)
    for step in range(SHRINK_STEPS):
        candidate = 1 - SHRINK * step
        error = _per_channel_error(flat, low * candidate, high * candidate, bits, symmetric)
        better = error < best
        best, ratio = torch.where(better, error, best), torch.where(better, candidate, ratio)
    return affine_parameters(low * ratio, high * ratio, bits, symmetric=symmetric)


class WeightRanges(Pass):
    """Give every layer a weight quantizer with nearest rounding."""

    name = "weight-ranges"

    class Options(PassOptions):
        """Options of ``weight-ranges``.

        Attributes:
            bits: width; None takes the recipe's target.
            edge_bits: least width of the first and last layers, which see or make the image itself.
            method: ``"minmax"`` or ``"shrink"``.
            symmetric: zero point 0, as integer kernels like it.
        """

        bits: int | None = Field(None, ge=1, le=16)
        edge_bits: int = Field(8, ge=1, le=16)
        method: Literal["minmax", "shrink"] = "shrink"
        symmetric: bool = True

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Write ``layer.weight`` for every layer that the traced forward runs."""
        runs = [name for name in plan.layers if name in context.partition.layers]
        for done, name in enumerate(runs):
            yield Progress(done, len(runs), name)
            layer = plan.layers[name]
            bits = self.options.bits or context.weight_bits
            if layer.roles & {"first", "last"}:
                bits = max(bits, self.options.edge_bits)
            weight = context.denoiser.get_submodule(name).weight
            if not bool(torch.isfinite(weight).all()):
                raise PlanError(f"the weight of layer {name!r} holds NaN or infinity: it cannot be quantized")
            scale, zero_point = weight_parameters(
                weight, bits, symmetric=self.options.symmetric, method=self.options.method
            )
            layer.weight = WeightQuant(
                bits, scale.cpu(), None if self.options.symmetric else zero_point.cpu()
            )
            layer.kept = "activations stay in floating point: no pass has chosen their ranges"
        yield Progress(len(runs), len(runs))
