"""Pass ``weight-ranges``: a weight quantizer with nearest rounding for every layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field

from dq_plugins.errors import PlanError
from dq_plugins.layer_kinds import LAYER_KINDS
from dq_plugins.plan import QuantPlan, Reason, WeightQuant
from dq_plugins.plan.layers import NO_RANGES
from dq_plugins.quantized.weight_scale import weight_parameters, weight_rows
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress


class WeightRanges(Pass):
    """Give every layer a weight quantizer with nearest rounding."""

    name = "weight-ranges"

    class Options(PassOptions):
        """Options of ``weight-ranges``.

        Attributes:
            bits: width; None takes the recipe's target.
            edge_bits: least width of the first and last layers, which see or make the image itself.
            embedding_bits: least width of embedding tables, which are small and whose errors every step adds in full.
            method: ``"minmax"`` or ``"shrink"``.
            symmetric: zero point 0, as integer kernels like it.
            keep_roles: layers with one of these roles stay in full precision, weights and activations. TFMQ-DM's
                released code keeps ``first``, ``last``, ``temporal_first``, ``shortcut`` and ``downsample``; here
                they are quantized unless named.
        """

        bits: int | None = Field(None, ge=1, le=16)
        edge_bits: int = Field(8, ge=1, le=16)
        embedding_bits: int = Field(1, ge=1, le=16)
        method: Literal["minmax", "shrink"] = "shrink"
        symmetric: bool = True
        keep_roles: tuple[str, ...] = ()

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Write ``layer.weight`` for every layer that the traced forward runs."""
        runs = [name for name in plan.layers if name in context.partition.layers]
        for done, name in enumerate(runs):
            yield Progress(done, len(runs), name)
            layer = plan.layers[name]
            roles = sorted(layer.roles & set(self.options.keep_roles))
            if roles:
                text = f"left in full precision as asked, for its role: {', '.join(roles)}"
                layer.unquantized_reason = Reason(text, "asked")
                continue
            bits = self.options.bits or context.weight_bits
            if layer.roles & {"first", "last"}:
                bits = max(bits, self.options.edge_bits)
            if LAYER_KINDS[layer.kind].lookup:
                bits = max(bits, self.options.embedding_bits)
            weight = weight_rows(context.denoiser.get_submodule(name), layer.balance)
            if not bool(torch.isfinite(weight).all()):
                raise PlanError(f"the weight of layer {name!r} holds NaN or infinity: it cannot be quantized")
            scale, zero_point = weight_parameters(
                weight, bits, symmetric=self.options.symmetric, method=self.options.method
            )
            layer.weight = WeightQuant(bits, scale.cpu(), None if self.options.symmetric else zero_point.cpu())
            layer.unquantized_reason = NO_RANGES
        yield Progress(len(runs), len(runs))
