"""What pass ``bit-allocation`` leaves in its section of the plan: the solver's answer, and why each width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dq_plugins.errors import PlanError
from dq_plugins.passes.allocation.explain import LayerReason, explain, table_of_reasons
from dq_plugins.passes.allocation.front import Front, mean_weight_bits, predicted_error
from dq_plugins.passes.allocation.solve import Allocation
from dq_plugins.plan import QuantPlan
from dq_plugins.solvers.solution import Use

SECTION = "bit-allocation"


@dataclass(frozen=True)
class FrontRecord:
    """Error against size by one rule."""

    rule: str
    weight_bits: tuple[float, ...]
    error: tuple[float, ...]


@dataclass(frozen=True)
class AllocationFindings:
    """The answer of an allocation; no times, which differ from run to run.

    Attributes:
        status: of the solution, see `dq_plugins.solvers.solution.Solution`.
        error: objective.
        bound: no choice has less.
        gap: relative distance of the two.
        tolerance: relative gap at which it counts as optimal.
        solver: who found it.
        binding: budgets that hold it back.
        budgets: what it uses of each.
        mean_weight_bits: bits of a weight.
        predicted_noise_power: sum of the sensitivities of the chosen widths.
        widths: by layer, such as ``W4A8``.
        reasons: why each, costliest to narrow first.
        fronts: error against size, if it was asked for.
        couplings: that MixDQ's own objective chose, by operand.
        content: content layers, for that objective.
    """

    status: str
    error: float
    bound: float
    gap: float
    tolerance: float
    solver: str
    binding: tuple[str, ...]
    budgets: tuple[Use, ...]
    mean_weight_bits: float
    predicted_noise_power: float
    widths: dict[str, str]
    reasons: tuple[LayerReason, ...]
    fronts: tuple[FrontRecord, ...] = ()
    couplings: dict[str, float] | None = None
    content: tuple[str, ...] | None = None


def findings_of(
    allocation: Allocation,
    fronts: Sequence[Front],
    couplings: dict[str, float] | None = None,
    content: tuple[str, ...] | None = None,
) -> AllocationFindings:
    """What to keep of an allocation."""
    solution, problem = allocation.solution, allocation.problem
    return AllocationFindings(
        status=solution.status,
        error=solution.objective,
        bound=solution.bound,
        gap=solution.gap,
        tolerance=solution.tolerance,
        solver=solution.solver,
        binding=tuple(solution.binding),
        budgets=tuple(solution.uses),
        mean_weight_bits=mean_weight_bits(problem, allocation.widths),
        predicted_noise_power=predicted_error(problem, allocation.widths),
        widths={name: str(width) for name, width in allocation.widths.items()},
        reasons=tuple(explain(allocation)),
        fronts=tuple(FrontRecord(f.rule, tuple(f.sizes), tuple(f.errors)) for f in fronts),
        couplings=couplings,
        content=content,
    )


def find(plan: QuantPlan) -> AllocationFindings | None:
    """The findings in a plan; None: no bit allocation made it."""
    section = plan.sections.get(SECTION)
    return None if section is None else section.read(AllocationFindings, SECTION)


def explanation(plan: QuantPlan, limit: int | None = None) -> str:
    """The reasons that a plan made by ``bit-allocation`` holds: what the solver says, then one line an operand.

    Args:
        plan: the plan.
        limit: how many lines; all by default.

    Raises:
        PlanError: no bit allocation made this plan.
    """
    found = find(plan)
    if found is None:
        raise PlanError(
            "this plan has no section 'bit-allocation': its widths were given, not chosen, so none has a reason"
        )
    held = ", ".join(found.binding) or "no budget"
    head = f"{found.status} ({found.solver}, gap {found.gap:.1e}), held back by {held}; "
    head += f"{found.mean_weight_bits:.3f} bits a weight"
    return head + "\n" + table_of_reasons(found.reasons, limit)
