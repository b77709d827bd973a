"""Pass ``weight-ranges``: a weight quantizer with nearest rounding for every layer, in groups of inputs if asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from dq_plugins.errors import PlanError
from dq_plugins.layer_kinds import LAYER_KINDS
from dq_plugins.passes.shared_inputs import TRANSFORMING
from dq_plugins.plan import QuantPlan, Reason
from dq_plugins.plan.layers import EDGE_ROLES, NO_RANGES
from dq_plugins.quantized.input_rows import has_rows
from dq_plugins.quantized.layer_transform import transform_of
from dq_plugins.quantized.weight_scale import layer_quantizer
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress


class WeightRanges(Pass):
    """Choose the scale of every weight, and round to nearest."""

    name = "weight-ranges"
    after = TRANSFORMING

    class Options(PassOptions):
        """Options of ``weight-ranges``.

        Attributes:
            embedding_bits: least width of embedding tables, which are small and whose errors every step adds in full.
            method: ``"minmax"``, ``"shrink"``, or ``"later"``: min-max for the layers whose scales ``gptq`` will choose
                again, which saves their search.
            keep_roles: layers with one of these roles stay in full precision, weights and activations. TFMQ-DM's
                released code keeps ``first``, ``last``, ``temporal_first``, ``shortcut`` and ``downsample``; here
                they are quantized unless named.
        """

        embedding_bits: int = Field(1, ge=1, le=16)
        method: Literal["minmax", "shrink", "later"] = "shrink"
        keep_roles: tuple[str, ...] = ()

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Write ``layer.weight`` for every layer that the traced forward runs."""
        targets = context.targets
        method = "shrink" if self.options.method == "later" else self.options.method
        plan.range_methods = replace(plan.range_methods, weights=method)
        runs = [name for name in plan.layers if name in context.partition.layers]
        for done, name in enumerate(runs):
            yield Progress(done, len(runs), name)
            layer = plan.layers[name]
            roles = sorted(layer.roles & set(self.options.keep_roles))
            if roles:
                text = f"left in full precision as asked, for its role: {', '.join(roles)}"
                layer.unquantized_reason = Reason(text, "asked")
                continue
            bits = targets.weight_bits
            if layer.roles & EDGE_ROLES:
                bits = max(bits, targets.edge_bits)
            if LAYER_KINDS[layer.kind].lookup:
                bits = max(bits, self.options.embedding_bits)
            module = context.denoiser.get_submodule(name)
            later = self.options.method == "later" and has_rows(module)
            of_layer = "minmax" if later else method
            try:
                layer.weight = layer_quantizer(module, bits, targets, method=of_layer, transform=transform_of(layer))
            except PlanError as error:
                raise PlanError(f"layer {name!r}: {error}") from error
            layer.unquantized_reason = NO_RANGES
        yield Progress(len(runs), len(runs))
