"""Pass ``gptq``: rounding that makes up for its own errors, from the second moments of each layer's input.

One sweep over recorded calls samples rows of the inputs of as many layers as fit into the memory allowed, then their
weights are rounded (`dq_plugins.passes.rounding.compensation`), then the next sweep. The first sweep also collects the
statistics that ranges are chosen from, where inputs are to be quantized. The inputs are those of full precision,
transformed where the plan transforms them.

Source: Frantar et al. 2022 (GPTQ).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dq_plugins.artifact import Format
from dq_plugins.hooks import hooked
from dq_plugins.observers.streaming import first_argument
from dq_plugins.passes.activations import activation_bits, statistics
from dq_plugins.passes.rounding.compensation import (
    GPTQOptions,
    compensated_codes,
    squares,
    weighted_quantizer,
)
from dq_plugins.plan import LayerPlan, QuantPlan, WeightQuant
from dq_plugins.quantized.input_rows import has_rows, input_rows, weight_matrix
from dq_plugins.quantized.layer_transform import transform_of, transformed_input, transformed_weight
from dq_plugins.quantized.memory import give_back, is_large, weight_bytes
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress

MEBIBYTE = 1 << 20
USUAL_MEMORY = 2048 * MEBIBYTE
STORED = torch.bfloat16
"""What sampled rows are kept in: their second moments are far less exact than this."""
SWEEP: Format[dict[str, WeightQuant]] = Format(
    "gptq-sweep", 1, dict[str, WeightQuant], what="a sweep of rounded layers"
)


class GPTQ(Pass):
    """Round weights one after the other, each making up for the errors of those before it."""

    name = "gptq"
    requires = ("weight-ranges",)
    after = ("bit-allocation", "weight-group-sizes", "timestep-reduction", "temporal-reconstruction")

    class Options(PassOptions):
        """Options of ``gptq``.

        Attributes:
            calls: recorded calls to learn from, spread evenly over the recording, in a sweep of its own.
            samples: of these calls together.
            rows: rows of a layer's input that count, drawn evenly from the calls of a sweep.
            statistics_samples: of the sweep that collects the statistics of ranges: of all recorded calls together,
                one of each at least. None: all.
            damping: see `GPTQOptions`.
            act_order: see `GPTQOptions`.
            columns: see `GPTQOptions`. None: 9,216, which takes the least time for the layers there are; 4,096 beside
                weights of more than 1 GiB, which takes the least memory.
            scales: choose each output's scale again, by the error that its inputs make of it.
            most_bits: wider weights keep their rounding.
            memory_mb: of the rows of the layers that one sweep serves. None: what 2 GiB leave beside the weights, and
                at least 15 % of the weights.
        """

        calls: int = Field(48, ge=1)
        samples: int = Field(96, ge=1)
        rows: int = Field(4800, ge=1)
        statistics_samples: int | None = Field(128, ge=1)
        damping: float = Field(0.01, gt=0)
        act_order: bool = True
        columns: int | None = Field(None, ge=1)
        scales: bool = True
        most_bits: int = Field(8, ge=2, le=16)
        memory_mb: int | None = Field(None, ge=16)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    @property
    def statistics_samples(self) -> int | None:
        """Of the option of this name."""
        return self.options.statistics_samples

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Write codes (and scales) sweep by sweep; a finished sweep is not made again after an interruption."""
        layers, finished = self._layers(plan, context), context.finished(SWEEP, plan, self.options)
        done = 0
        for place, chunk in enumerate(self._chunks(layers, context)):
            unit = " ".join(chunk)
            weights = finished.find(unit)
            if weights is None:
                yield Progress(done, len(layers), f"inputs of {len(chunk)} layers")
                # only ever the first, so that a run that was interrupted behind it sees the same calls
                inputs = self._inputs(chunk, plan, context, with_statistics=place == 0)
                weights = yield from self._sweep(inputs, plan, context, done, len(layers))
                weights = finished.keep(unit, weights)
            for name, weight in weights.items():
                plan.layers[name].weight = weight
            if is_large(context.denoiser):
                give_back()
            done += len(chunk)
            yield Progress(done, len(layers), chunk[-1])

    def _sweep(
        self, inputs: dict[str, _Rows], plan: QuantPlan, context: PassContext, done: int, total: int
    ) -> Generator[Progress, None, dict[str, WeightQuant]]:
        columns = self.options.columns or (4096 if is_large(context.denoiser) else 9216)
        options = GPTQOptions(self.options.damping, self.options.act_order, columns)
        found = {}
        # the largest last, when the rows of all others are gone
        for name in sorted(inputs, key=lambda name: context.denoiser.get_submodule(name).weight.numel()):
            yield Progress(done + len(found), total, name)
            layer = context.denoiser.get_submodule(name)
            found[name] = self._rounded(layer, plan.layers[name], inputs[name].taken(), options)
        return found

    def _layers(self, plan: QuantPlan, context: PassContext) -> list[str]:
        return [
            name
            for name in context.partition.layers
            if (layer := plan.layers.get(name)) is not None
            and layer.weight is not None
            and layer.weight.rounds
            and layer.weight.bits <= self.options.most_bits
            and has_rows(context.denoiser.get_submodule(name))
        ]

    def _chunks(self, layers: list[str], context: PassContext) -> Iterator[list[str]]:
        limit, chunk, used = self._memory(context.denoiser), [], 0
        for name in layers:
            matrix = weight_matrix(layer := context.denoiser.get_submodule(name), layer.weight)  # [P, O/P, K]
            size = STORED.itemsize * self.options.rows * matrix.shape[0] * matrix.shape[2]
            if chunk and used + size > limit:
                yield chunk
                chunk, used = [], 0
            chunk.append(name)
            used += size
        if chunk:
            yield chunk

    def _memory(self, denoiser: nn.Module) -> float:
        """Bytes that rows may take."""
        if self.options.memory_mb is not None:
            return self.options.memory_mb * MEBIBYTE
        return max(USUAL_MEMORY - weight_bytes(denoiser), 0.15 * weight_bytes(denoiser))

    def _inputs(
        self, names: list[str], plan: QuantPlan, context: PassContext, *, with_statistics: bool
    ) -> dict[str, _Rows]:
        """Rows of the inputs of those of some layers that run, in the sweep of the statistics if that is to be."""
        modules = {name: context.denoiser.get_submodule(name) for name in names}
        found: dict[str, _Rows] = {}
        generator = context.generator(*names)

        def see(name: str, x: Tensor, calls: int) -> None:
            if name in modules:
                share = -(-self.options.rows // calls)
                found.setdefault(name, _Rows(share * calls)).add(input_rows(modules[name], x, share, generator))

        bits = activation_bits(plan, context)
        if with_statistics and modules.keys() <= bits.keys():
            every = len(context.calibration)
            statistics(context, tuple(sorted(bits)), also=lambda name, x, _: see(name, x, every))
        if not found:  # the statistics were known
            calls = context.calibration.spread(self.options.calls, self.options.samples)

            def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = first_argument(name, args, kwargs)
                see(name, transformed_input(modules[name], context.transforms.get(name), x), len(calls))

            with hooked(modules, before=before, first=True):
                for call in calls.calls():
                    call.run(context.denoiser)
        return found

    def _rounded(self, layer: nn.Module, plan: LayerPlan, rows: Tensor, options: GPTQOptions) -> WeightQuant:
        quant: Any = plan.weight
        matrix = weight_matrix(layer, transformed_weight(layer, transform_of(plan)).float())  # [P, O/P, K]
        if self.options.scales:
            found = [weighted_quantizer(w, squares(x), quant) for w, x in zip(matrix, rows, strict=True)]
            parts = ("scale", "zero_point", "group_scale")
            quant = WeightQuant(
                quant.bits, **{part: _joined([getattr(each, part) for each in found]) for part in parts}
            )
        per_group = len(matrix[0])
        codes = [
            compensated_codes(w, x, _outputs(quant, slice(p * per_group, (p + 1) * per_group)), options)
            for p, (w, x) in enumerate(zip(matrix, rows, strict=True))
        ]
        return replace(quant, codes=torch.cat(codes).reshape(layer.weight.shape))


class _Rows:
    """Sampled rows of one layer, in one piece of memory from the start: many small ones leave gaps.

    Args:
        expected: how many there will be about.
    """

    def __init__(self, expected: int) -> None:
        self._expected, self._count = expected, 0
        self._kept: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Keep ``[P, R, K]``."""
        groups, new, width = rows.shape
        if self._kept is None:
            self._kept = torch.empty(groups, max(self._expected, new), width, dtype=STORED)
        missing = self._count + new - self._kept.shape[1]
        if missing > 0:
            more = max(missing, self._expected // 4)
            self._kept = torch.cat([self._kept, self._kept.new_empty(groups, more, width)], 1)
        self._kept[:, self._count : self._count + new] = rows
        self._count += new

    def taken(self) -> Tensor:
        """All of them, ``[P, R, K]``; they are not kept any longer."""
        kept, self._kept = self._kept, None
        assert kept is not None, "rows are added before they are taken"
        return kept[:, : self._count]


def _joined(tables: list[Tensor | None]) -> Tensor | None:
    return torch.cat([table for table in tables if table is not None]) if tables[0] is not None else None


def _outputs(quant: WeightQuant, part: slice) -> WeightQuant:
    if len(quant.scale) == 1:
        return quant
    zero_point, group_scale = (None if t is None else t[part] for t in (quant.zero_point, quant.group_scale))
    return replace(quant, scale=quant.scale[part], zero_point=zero_point, group_scale=group_scale)
