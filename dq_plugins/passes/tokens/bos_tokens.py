"""Pass ``bos-tokens``: outlier tokens of text embeddings computed exactly, the others quantized on their own range.

Source: MixDQ (Zhao et al. 2024), BOS-aware quantization. Here the tokens are found by probing the recorded conditions,
the stored row is checked against every sample, and other rows are computed live; see `dq_plugins.passes.tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dq_plugins.observers.streaming import stream_inputs
from dq_plugins.passes.tokens.outliers import RATIO, SHARE, TokenStatistics, find_outliers
from dq_plugins.passes.width_candidates import activation_candidates
from dq_plugins.plan import OutlierRows, QuantPlan, Section
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress

ROLES = frozenset({"cross_attention_key", "cross_attention_value"})


class BosTokens(Pass):
    """Compute outlier tokens of text embeddings exactly, so that they no longer widen ranges."""

    name = "bos-tokens"
    after = ("weight-ranges", "timestep-groups", "activation-ranges")

    class Options(PassOptions):
        """Options of ``bos-tokens``.

        Attributes:
            ratio: how much larger than the other tokens' an outlier's largest value is at least.
            share: least share of recorded samples that hold the same row.
        """

        ratio: float = Field(RATIO, gt=1)
        share: float = Field(SHARE, gt=0, le=1)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Write ``plan.outlier_rows`` and the ranges of its layers."""
        layers = [n for n in context.partition.layers if context.partition.layers[n].roles & ROLES and n in plan.layers]
        if not layers:
            plan.sections[self.name] = Section({"skipped": "no layer makes keys or values of cross-attention"})
            return
        statistics = {name: TokenStatistics() for name in layers}
        # conditions do not change with t, so the calls of two timesteps show them all
        timesteps = sorted({context.calibration.timesteps[0], context.calibration.timesteps[-1]})
        calls = context.calibration.subset(timesteps=timesteps)
        source = context.denoiser, calls, layers
        watching = stream_inputs(*source, lambda name, x, _: statistics[name].update(x), rows=context.row_orders)
        for done, t in enumerate(watching):
            yield Progress(done + 1, len(timesteps) + 1, f"t = {t:g}")
        found = {n: tokens for n in layers if (tokens := self._tokens(context, n, statistics[n])) is not None}
        plan.outlier_rows = found
        plan.sections[self.name] = Section(_findings(statistics, found))
        narrowed = [(n, a.bits) for n in found if (a := plan.layers[n].activation) is not None]
        ranges = activation_candidates(plan, context, [n for n, _ in narrowed], sorted({b for _, b in narrowed}))
        for name, bits in narrowed:
            plan.layers[name].activation = ranges[name][bits]
        yield Progress(len(timesteps) + 1, len(timesteps) + 1)

    def _tokens(self, context: PassContext, name: str, statistics: TokenStatistics) -> OutlierRows | None:
        outliers = find_outliers(statistics, self.options.ratio, self.options.share)
        if not outliers:
            return None
        layer: Any = context.denoiser.get_submodule(name)
        rows = torch.stack([token.vector for token in outliers]).to(layer.weight)
        bias: Tensor | None = layer.bias
        # float64: the exact row, whatever order a kernel sums in
        values = F.linear(rows.double(), layer.weight.double(), None if bias is None else bias.double())
        return OutlierRows(tuple(token.position for token in outliers), rows.cpu(), values.to(layer.weight.dtype).cpu())


def _findings(statistics: dict[str, TokenStatistics], found: dict[str, OutlierRows]) -> dict[str, Any]:
    """What was seen: by layer, the position with the largest ratio, found or not."""
    seen = {}
    for name, each in statistics.items():
        best = max(each.candidates(), key=lambda token: token.ratio, default=None)
        if best is not None:
            seen[name] = {"position": best.position, "ratio": round(best.ratio, 4), "share": round(best.share, 4)}
    note = {} if found else {"skipped": "no token is the same for most samples and far larger than the others"}
    return {"seen": seen, **note}
