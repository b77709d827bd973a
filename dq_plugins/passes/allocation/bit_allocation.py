"""Pass ``bit-allocation``: the widths of every layer's weight and input, by an exact program.

Source: MixDQ (Zhao et al. 2024). The default objective is the predicted error of the final image, where it was
measured, else the sum of noise powers of the denoiser's output; the paper's own (sum of SQNR and SSIM, with the
coupling scan) is ``objective="mixdq"``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from dq_plugins.errors import BudgetError, PlanError
from dq_plugins.passes.allocation.columns import choice_of
from dq_plugins.passes.allocation.coupling import mixdq_widths
from dq_plugins.passes.allocation.findings import SECTION, find, findings_of
from dq_plugins.passes.allocation.front import Front, draw, fronts
from dq_plugins.passes.allocation.problem import (
    Allocation,
    AllocationProblem,
    Budgets,
    LayerCost,
    allocate,
    allocate_image,
)
from dq_plugins.passes.attention import attention_sizes
from dq_plugins.passes.image_errors import whole_runs
from dq_plugins.passes.width_candidates import candidates_of, write_widths
from dq_plugins.plan import QuantPlan, Section
from dq_plugins.plan.layers import EDGE_ROLES
from dq_plugins.quantized.candidates import Candidates
from dq_plugins.quantized.exact_tokens import install_tokens
from dq_plugins.quantized.width import Width, WidthChoices, entries_of
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.sensitivity.exact_noise import final_samples
from dq_plugins.sensitivity.sensitivity_table import SensitivityTable
from dq_plugins.solvers.answer import answer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER_CONTENT = ("attn2", "ff")
"""MixDQ's rule: a layer is of the content group if its name holds one of these."""


class BitAllocation(Pass):
    """Choose every layer's width within a budget, by integer programming."""

    name = SECTION
    requires = ("sensitivity",)

    class Options(Budgets):
        """Options of ``bit-allocation``, its `Budgets` among them.

        The widths on offer are those that ``sensitivity`` measured. Without any of the budgets ``bytes``, ``bitops``
        and ``latency``, the mean bits of weights and inputs default to the recipe's targets.

        Attentions that the plan quantizes are decided about where they count in a budget: in ``bitops``, or in
        ``latency`` if the table has them, by their names in ``plan.sensitivity``. Elsewhere narrower operands would
        save nothing, so they keep the widths of the plan.

        Attributes:
            objective: ``"image"`` (error of the final image), ``"noise-power"`` (of the denoiser's output), or
                ``"mixdq"`` (the paper's). None: ``"image"`` where it was measured, else ``"noise-power"``.
            solver: a registered solver.
            latency_table: measured time by layer and width: ``{"conv_in": {"W8A8": 0.8, "W4A8": 0.9}}``.
            pinned: widths of single layers: ``{"conv_in": "W8A8"}``.
            role_choices: widths of weights by role, where they differ: ``{"first": [8]}``.
            role_act_choices: the same for inputs.
            edge_bits: least width of weights and inputs of the first and last layers, as the rules that others use
                have it; None: the program decides.
            full_precision: offer full precision, too, for all weights and inputs.
            tolerance: relative gap at which the solution counts as optimal.
            content_by: who is a content layer in ``"mixdq"``: ``"measured"`` or ``"paper"``.
            sweep: limits on mean weight bits at which error against size is drawn; none by default.
        """

        objective: Literal["image", "noise-power", "mixdq"] | None = None
        solver: str = "cp-sat"
        latency_table: dict[str, dict[str, float]] = Field(default_factory=dict)
        pinned: dict[str, str] = Field(default_factory=dict)
        role_choices: dict[str, tuple[int, ...]] = Field(default_factory=dict)
        role_act_choices: dict[str, tuple[int, ...]] = Field(default_factory=dict)
        edge_bits: int | None = None
        full_precision: bool = False
        tolerance: float = Field(0.0, ge=0)
        content_by: Literal["measured", "paper"] = "measured"
        sweep: tuple[float, ...] = ()

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Solve, and rewrite the quantizers of every layer that the sensitivities are of.

        Raises:
            BudgetError: the budgets cannot be met; the message holds the nearest that can.
        """
        measured = plan.sensitivity
        if measured is None:
            raise PlanError(
                f"pass {self.name!r} needs sensitivities, and the plan has none: run the pass 'sensitivity'"
            )
        table = SensitivityTable.of(measured)
        candidates = candidates_of(plan, context, measured.weight_choices, measured.act_choices)
        problem = self.problem(plan, context, table, candidates)
        yield Progress(0, 2, "solving")
        allocation, found = self._solve(plan, context, problem, table, candidates)
        write_widths(plan, allocation.widths, candidates)
        yield Progress(1, 2, "error against size")
        noise = sum(table.noise[entry] for entry in entries_of(allocation.widths))
        drawn = self._fronts(plan, context, allocation.problem)
        plan.sections[self.name] = Section.of(findings_of(allocation, drawn, predicted_noise_power=noise, **found))
        yield Progress(2, 2)

    @classmethod
    def figure(cls, plan: QuantPlan) -> tuple[Figure, str] | None:
        """Error against size, the chosen point marked, if the option ``sweep`` asked for it."""
        found = find(plan)
        if found is None or not found.fronts:
            return None
        image = found.predicted_image_error is not None
        label = "predicted error of the final image" if image else "predicted noise power / signal"
        chosen = (found.mean_weight_bits, found.error)
        caption = "Predicted error against size: the exact program beside the rules that others use."
        return draw(found.fronts, chosen, label), caption

    def problem(
        self, plan: QuantPlan, context: PassContext, table: SensitivityTable, candidates: Candidates
    ) -> AllocationProblem:
        """The allocation problem that the options describe."""
        o = self.options
        layers = {}
        for name in candidates.layers:
            info = context.partition.layers[name]
            inputs = math.prod(info.input_shape) if name in candidates.activations else 0
            scales = {b: q.group_scale.nbytes for b, q in candidates.weights[name].items() if q.group_scale is not None}
            layers[name] = LayerCost(math.prod(info.weight_shape), inputs, info.macs, info.block, scales)
        attending = self._attending(candidates)
        sizes = attention_sizes(context, attending) if attending else {}
        for name, size in sizes.items():
            layers[name] = LayerCost(0, size.inputs, size.macs, value_macs=size.value_macs)
        weight: Any = context.denoiser.get_submodule(candidates.layers[0]).weight
        problem = AllocationProblem(
            layers,
            table.noise,
            {name: self._choices(plan, candidates, name) for name in layers},
            budgets=self._budgets(context),
            latency={n: {Width.parse(w): ms for w, ms in times.items()} for n, times in o.latency_table.items()},
            float_bits=weight.element_size() * 8,
        )
        edges = [name for name in candidates.layers if plan.layers[name].roles & EDGE_ROLES and name not in o.pinned]
        return problem if o.edge_bits is None else problem.with_least(edges, o.edge_bits)

    def _attending(self, candidates: Candidates) -> list[str]:
        """The attentions that count in a budget, by name."""
        o = self.options
        timed = o.latency_table if o.latency is not None else {}
        return [name for name in candidates.attention if o.bitops is not None or name in timed]

    def _budgets(self, context: PassContext) -> Budgets:
        o = self.options
        given = o.model_dump(include=set(Budgets.model_fields), exclude_none=True)
        if (o.bytes, o.bitops, o.latency) == (None, None, None):
            given = {"weight_bits": context.targets.weight_bits, "act_bits": context.targets.act_bits, **given}
        if context.targets.act_bits is None:  # no input is quantized, so there is nothing to limit
            given.pop("act_bits", None)
        return Budgets(**given)

    def _choices(self, plan: QuantPlan, candidates: Candidates, name: str) -> WidthChoices:
        o = self.options
        weight: tuple[int | None, ...] = tuple(sorted(candidates.weights.get(name, ()))) or (None,)
        activation: tuple[int | None, ...] = tuple(sorted(candidates.inputs.get(name, ())))
        for role in sorted(plan.layers[name].roles) if name in plan.layers else ():
            weight = o.role_choices.get(role, weight)
            activation = o.role_act_choices.get(role, activation)
        if o.full_precision:
            weight, activation = tuple(dict.fromkeys((*weight, None))), (*activation, None)
        if name in o.pinned:
            pinned = Width.parse(o.pinned[name])
            weight, activation = (pinned.weight,), (pinned.activation,)
        return WidthChoices(weight, activation or (None,))

    def _solve(
        self,
        plan: QuantPlan,
        context: PassContext,
        problem: AllocationProblem,
        table: SensitivityTable,
        candidates: Candidates,
    ) -> tuple[Allocation, dict[str, Any]]:
        o = self.options
        unknown = sorted(set(o.pinned) - set(problem.layers))
        if unknown:
            raise BudgetError(f"layer {unknown[0]!r} is pinned, but it is none of the layers that were measured")
        exact = {"tolerance": o.tolerance} if o.solver in ("cp-sat", "mip") else {}
        objective = o.objective or ("noise-power" if table.image is None else "image")
        if objective == "image":
            if table.image is None:
                raise PlanError(
                    "objective 'image' needs what widths do to the final image, which was not measured: run the pass "
                    "'sensitivity' with image=True on whole sampling runs, or take objective='noise-power'"
                )
            allocation = allocate_image(problem, table.image, o.solver, **exact)
            allocation.solution.require()
            predicted = table.image.of(entries_of(allocation.widths))
            return allocation, {"objective": objective, "predicted_image_error": predicted}
        if objective == "noise-power":
            allocation = allocate(problem, o.solver, **exact)
            allocation.solution.require()
            return allocation, {"objective": objective}
        runs = whole_runs(context, 1)

        def image_error(widths: Mapping[str, Width]) -> float:
            with install_tokens(context.denoiser, plan):
                final = final_samples(context.denoiser, candidates, entries_of(widths), runs[0])
            return float((final - runs[0].final()).double().square().mean())

        paper = [name for name in problem.layers if any(part in name for part in PAPER_CONTENT)]
        groups = table.metric_kinds(o.content_by, paper=paper)
        widths, couplings = mixdq_widths(problem, table, groups, image_error, solver=o.solver, **exact)
        program, columns = problem.program()
        choice = choice_of(program, columns, widths)
        solution = answer(program, choice, f"mixdq over {o.solver}", time.perf_counter())
        content = tuple(sorted(name for name, group in groups.items() if group == "content"))
        return Allocation(problem, widths, solution), {
            "objective": objective,
            "couplings": couplings,
            "content": content,
        }

    def _fronts(self, plan: QuantPlan, context: PassContext, problem: AllocationProblem) -> list[Front]:
        edges = [n for n in problem.layers if n in plan.layers and plan.layers[n].roles & EDGE_ROLES]
        least = dict.fromkeys(edges, context.targets.edge_bits)
        return list(fronts(problem, sorted(self.options.sweep), least=least)) if self.options.sweep else []
