"""Pass ``sensitivity``: what each width of each layer's weight and input costs in quality and in content.

Linearised by default: a few backward passes estimate all entries at once, and an exact measurement of some of them
checks and corrects the estimate. ``method="exact"`` is the naive measurement of every entry.

Where the recording holds whole sampling runs, what each entry does to the final image is measured as well, and what
adds up over steps and layers apart from what averages out: see `dq_plugins.sensitivity.drift`.

Source: MixDQ (Zhao et al. 2024), metric-decoupled sensitivity; see `dq_plugins.sensitivity` for what differs.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from dq_plugins.artifact import UnitResults
from dq_plugins.calibration import CalibrationSet
from dq_plugins.errors import RecipeError
from dq_plugins.hashing import hash_json
from dq_plugins.passes.image_errors import image_parts, whole_runs
from dq_plugins.passes.width_candidates import candidates_of
from dq_plugins.plan import QuantPlan
from dq_plugins.quantized.candidates import Candidates
from dq_plugins.quantized.exact_tokens import install_tokens
from dq_plugins.quantized.run import WIDE
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.sensitivity.drift import DriftProbes, image_error
from dq_plugins.sensitivity.exact_noise import ExactContent, ExactQuality
from dq_plugins.sensitivity.measure import MEASURED, Measurement, Sums, measure
from dq_plugins.sensitivity.probes import ContentProbes, QualityProbes
from dq_plugins.sensitivity.sensitivity_table import SensitivityTable, cost, entries_to_check, naive_cost, relative
from dq_plugins.sensitivity.trajectory import Trajectory


class Sensitivity(Pass):
    """Measure what each layer, and each attention that the plan quantizes, does to the output at each width."""

    name = "sensitivity"
    requires = ("weight-ranges",)
    after = ("timestep-groups", "activation-ranges", "attention-ranges", "bos-tokens")

    class Options(PassOptions):
        """Options of ``sensitivity``.

        Attributes:
            weight_choices: widths of weights; one bit is BinaryDM's: signs, scaled by the mean magnitude.
            act_choices: widths of inputs, those of query, key and value of attentions among them; not measured when
                activations stay in floating point. None: the recipe's target alone.
            method: ``"linearised"`` or ``"exact"``.
            calls_per_timestep: recorded calls used at each timestep.
            draws: backward passes over all calls together. An allocation picks widths that look cheap, so it picks
                underestimates too: with few draws the plan turns out worse than predicted.
            check_entries: entries measured exactly to check and correct each estimate; 0 for none.
            image: measure what entries do to the final image; None: where the recording holds whole sampling runs.
            image_probes: random probes of the final image.
            image_runs: sampling runs used for it.
            content: measure the loss of similarity of the final samples as well.
            content_probes: backward passes through a sampling run for each part (structure, texture).
            runs: sampling runs used for content.
            content_metric: registered metric of final samples; another one than ``"ssim"`` needs ``method="exact"``.
            workers: processes (joblib), where `dq_plugins.workers` does not say more.
        """

        weight_choices: tuple[int, ...] = Field((2, 3, 4, 6, 8), min_length=1)
        act_choices: tuple[int, ...] | None = Field((4, 6, 8), min_length=1)
        method: Literal["linearised", "exact"] = "linearised"
        calls_per_timestep: int = Field(2, ge=1)
        draws: int = Field(160, ge=1)
        check_entries: int = Field(32, ge=0)
        image: bool | None = None
        image_probes: int = Field(8, ge=1)
        image_runs: int = Field(2, ge=1)
        content: bool = False
        content_probes: int = Field(2, ge=1)
        runs: int = Field(1, ge=1)
        content_metric: str = "ssim"
        workers: int = Field(1, ge=1, exclude=True)  # no plan depends on it

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Measure quality, check it, and measure content if asked for."""
        o = self.options
        if o.content and o.content_metric != "ssim" and o.method != "exact":
            raise RecipeError(
                f"pass 'sensitivity': content_metric={o.content_metric!r} cannot be linearised; set method='exact', or "
                "use 'ssim'"
            )
        act_choices = o.act_choices or (context.targets.act_bits or WIDE,)
        candidates = candidates_of(plan, context, o.weight_choices, act_choices)
        calls = context.calibration.subset(per_timestep=o.calls_per_timestep)
        with install_tokens(context.denoiser, plan):  # rows of outlier tokens are exact whatever the widths
            table = yield from self._quality(candidates, context, calls)
            runs = self._runs(context)
            if runs:
                table = yield from self._image(candidates, context, table, runs)
            if o.content:
                table = yield from self._content(candidates, context, table)
        plan.sensitivity = table.measured(o.weight_choices, act_choices)

    def _quality(
        self, candidates: Candidates, context: PassContext, calls: CalibrationSet
    ) -> Generator[Progress, None, SensitivityTable]:
        o = self.options
        if o.method == "exact":
            exact = ExactQuality(context.denoiser, candidates, calls)
            results = yield from self._measure(exact, context, calls, candidates, "noise, exact")
            spent = cost(results)
            return SensitivityTable(relative(results, candidates), calls=spent, naive_calls=spent)
        probes = QualityProbes(context.denoiser, candidates, calls, -(-o.draws // len(calls)), context.stream("noise"))
        results = yield from self._measure(probes, context, calls, candidates, "noise, linearised")
        naive = naive_cost(candidates, len(calls))
        table = SensitivityTable(relative(results, candidates), calls=cost(results), naive_calls=naive)
        if o.check_entries == 0:
            return table
        checked = candidates.subset(entries_to_check(table, o.check_entries))
        few = context.calibration.subset(per_timestep=1)
        sample = ExactQuality(context.denoiser, checked, few)
        results = yield from self._measure(sample, context, few, candidates, "noise, exact sample")
        return table.corrected(relative(results, checked), cost(results))

    def _runs(self, context: PassContext) -> list[Trajectory]:
        """The sampling runs on which the error of the final image is measured."""
        if self.options.image is False:
            return []
        # without any, noise power alone: the allocation says which objective it had
        return whole_runs(context, self.options.image_runs, required=bool(self.options.image))

    def _image(
        self, candidates: Candidates, context: PassContext, table: SensitivityTable, runs: list[Trajectory]
    ) -> Generator[Progress, None, SensitivityTable]:
        o = self.options
        parts = image_parts(context, runs, o.image_probes)
        probes = DriftProbes(context.denoiser, candidates, parts, o.image_probes, context.stream("image"))
        results = yield from self._measure(probes, context, context.calibration, candidates, "image, linearised")
        image, exact = image_error(results, candidates.entries()), {}
        count = len(candidates.entries()) if o.method == "exact" else o.check_entries
        if count:
            alone = image.alone()
            checked = candidates.subset(sorted(alone, key=alone.__getitem__, reverse=True)[:count])
            sample = ExactContent(context.denoiser, checked, runs, "mse")
            found = yield from self._measure(sample, context, context.calibration, checked, "image, exact")
            exact, results = relative(found, checked), {**results, **found}
        return table.with_image(image, exact, cost(results))

    def _content(
        self, candidates: Candidates, context: PassContext, table: SensitivityTable
    ) -> Generator[Progress, None, SensitivityTable]:
        o = self.options
        runs = whole_runs(context, o.runs)
        naive = table.naive_calls + naive_cost(candidates, sum(run.steps for run in runs))
        probes = ContentProbes(context.denoiser, candidates, runs, o.content_probes, context.stream("content"))
        results = yield from self._measure(probes, context, context.calibration, candidates, "content, linearised")
        structure, texture = (relative(results, candidates, f"#{part}") for part in ("structure", "texture"))
        if o.method == "exact":
            exact = ExactContent(context.denoiser, candidates, runs, o.content_metric)
            found = yield from self._measure(exact, context, context.calibration, candidates, "content, exact")
            loss, results = relative(found, candidates), {**results, **found}
            # how much of it is structure is known from the linearised form only
            shares = {e: structure[e] / max(structure[e] + texture[e], 1e-300) for e in loss}
            structure = {e: loss[e] * shares[e] for e in loss}
            texture = {e: loss[e] * (1 - shares[e]) for e in loss}
        return replace(
            table, structure=structure, texture=texture, calls=table.calls + cost(results), naive_calls=naive
        )

    def _measure(
        self, measurement: Measurement, context: PassContext, calls: CalibrationSet, candidates: Candidates, what: str
    ) -> Generator[Progress, None, dict[str, Sums]]:
        settings = {
            "model": context.calibration.model_hash,
            "calls": calls.hash,
            "candidates": candidates.hash,
            "seed": context.seed,
            "what": what,
            "units": measurement.units(),
            "probes": [self.options.draws, self.options.content_probes, self.options.image_probes],
            "content": [self.options.runs, self.options.content_metric, self.options.image_runs],
        }
        folder = context.workdir and context.workdir / "measurements" / hash_json(settings)[:16]
        kept = UnitResults(MEASURED, folder, settings)
        return (yield from measure(measurement, kept, workers=self.options.workers, what=what))
