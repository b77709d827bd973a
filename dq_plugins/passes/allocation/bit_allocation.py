"""Pass ``bit-allocation``: the widths of every layer's weight and input, by an exact program.

Source: MixDQ (Zhao et al. 2024). The default objective is the sum of noise powers, which predicts the error of a plan;
the paper's own (sum of SQNR and SSIM, with the coupling scan) is ``objective="mixdq"``.
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
from dq_plugins.passes.allocation.problem import Allocation, AllocationProblem, Budgets, LayerCost, allocate
from dq_plugins.passes.width_candidates import candidates_of, write_widths
from dq_plugins.plan import QuantPlan, Section
from dq_plugins.plan.layers import EDGE_ROLES
from dq_plugins.quantized.candidates import Candidates
from dq_plugins.quantized.exact_tokens import install_tokens
from dq_plugins.quantized.width import Width, WidthChoices, entries_of
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.sensitivity.exact_noise import final_samples
from dq_plugins.sensitivity.sensitivity_table import SensitivityTable
from dq_plugins.sensitivity.trajectory import trajectories_of
from dq_plugins.solvers.answer import answer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER_CONTENT = ("attn2", "ff")
"""MixDQ's rule: a layer is of the content group if its name holds one of these."""


class BitAllocation(Pass):
    """Choose widths, and put the quantizers of those widths into the plan."""

    name = SECTION
    requires = ("sensitivity",)

    class Options(Budgets):
        """Options of ``bit-allocation``, its `Budgets` among them.

        The widths on offer are those that ``sensitivity`` measured. Without any of the budgets ``bytes``, ``bitops``
        and ``latency``, the mean bits of weights and inputs default to the recipe's targets.

        Attributes:
            objective: ``"noise-power"`` or ``"mixdq"`` (the paper's).
            solver: a registered solver.
            latency_table: measured time by layer and width: ``{"conv_in": {"W8A8": 0.8, "W4A8": 0.9}}``.
            pinned: widths of single layers: ``{"conv_in": "W8A8"}``.
            role_choices: widths of weights by role, where they differ: ``{"first": [8]}``.
            role_act_choices: the same for inputs.
            full_precision: offer full precision, too, for all weights and inputs.
            tolerance: relative gap at which the solution counts as optimal.
            content_by: who is a content layer in ``"mixdq"``: ``"measured"`` or ``"paper"``.
            sweep: limits on mean weight bits at which error against size is drawn; none by default.
        """

        objective: Literal["noise-power", "mixdq"] = "noise-power"
        solver: str = "cp-sat"
        latency_table: dict[str, dict[str, float]] = Field(default_factory=dict)
        pinned: dict[str, str] = Field(default_factory=dict)
        role_choices: dict[str, tuple[int, ...]] = Field(default_factory=dict)
        role_act_choices: dict[str, tuple[int, ...]] = Field(default_factory=dict)
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
        plan.sections[self.name] = Section.of(findings_of(allocation, self._fronts(plan, context, problem), **found))
        yield Progress(2, 2)

    @classmethod
    def figure(cls, plan: QuantPlan) -> tuple[Figure, str] | None:
        """Error against size, the chosen point marked, if the option ``sweep`` asked for it."""
        found = find(plan)
        if found is None or not found.fronts:
            return None
        chosen = (found.mean_weight_bits, found.predicted_noise_power)
        caption = "Predicted error against size: the exact program beside the rules that others use."
        return draw(found.fronts, chosen, "predicted noise power / signal"), caption

    def problem(
        self, plan: QuantPlan, context: PassContext, table: SensitivityTable, candidates: Candidates
    ) -> AllocationProblem:
        """The allocation problem that the options describe."""
        o = self.options
        layers = {}
        for name in candidates.layers:
            info = context.partition.layers[name]
            inputs = math.prod(info.input_shape) if name in candidates.activations else 0
            layers[name] = LayerCost(math.prod(info.weight_shape), inputs, info.macs, info.block)
        weight: Any = context.denoiser.get_submodule(candidates.layers[0]).weight
        return AllocationProblem(
            layers,
            table.noise,
            {name: self._choices(plan, candidates, name) for name in layers},
            budgets=self._budgets(context),
            latency={n: {Width.parse(w): ms for w, ms in times.items()} for n, times in o.latency_table.items()},
            float_bits=weight.element_size() * 8,
        )

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
        weight: tuple[int | None, ...] = tuple(sorted(candidates.weights[name]))
        activation: tuple[int | None, ...] = tuple(sorted(candidates.activations.get(name, ())))
        for role in sorted(plan.layers[name].roles):
            weight = o.role_choices.get(role, weight)
            activation = o.role_act_choices.get(role, activation)
        if o.full_precision:
            weight, activation = (*weight, None), (*activation, None)
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
        if o.objective == "noise-power":
            allocation = allocate(problem, o.solver, **exact)
            allocation.solution.require()
            return allocation, {}
        runs = trajectories_of(context.calibration, context.partition.sample_argument)[:1]

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
        return Allocation(problem, widths, solution), {"couplings": couplings, "content": content}

    def _fronts(self, plan: QuantPlan, context: PassContext, problem: AllocationProblem) -> list[Front]:
        edges = [name for name in problem.layers if plan.layers[name].roles & EDGE_ROLES]
        least = dict.fromkeys(edges, context.targets.edge_bits)
        return list(fronts(problem, sorted(self.options.sweep), least=least)) if self.options.sweep else []
