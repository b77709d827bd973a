"""A pass that leaves small layers in full precision."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from dq_plugins.plan import QuantPlan, Reason
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress


class KeepSmallLayers(Pass):
    """Leave layers in full precision whose weights are too few to matter for the size of the model.

    A layer of a few hundred weights costs next to nothing to keep, and its error is as harmful as any other.
    """

    name = "keep-small-layers"
    requires = ("weight-ranges",)
    after = ("activation-ranges",)

    class Options(PassOptions):
        """Options of ``keep-small-layers``.

        Attributes:
            fewer_than: layers with fewer weights than this are kept.
        """

        fewer_than: int = Field(256, ge=1)

    options: Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Take the quantizers of small layers out of the plan, and say why."""
        for done, (name, layer) in enumerate(plan.layers.items()):
            yield Progress(done, len(plan.layers), name)
            weights = context.denoiser.get_submodule(name).weight.numel()
            if weights < self.options.fewer_than:
                layer.weight = layer.activation = None
                text = f"it has {weights} weights, fewer than {self.options.fewer_than} (pass {self.name})"
                layer.unquantized_reason = Reason(text, "asked")
        yield Progress(len(plan.layers), len(plan.layers))
