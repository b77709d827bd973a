"""What pass ``bit-allocation`` leaves in its section of the plan: the solver's answer, and why each width.

The reasons answer "which layers must stay in high precision" by measurement, where other tools ship lists of names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dq_plugins.errors import PlanError
from dq_plugins.passes.allocation.front import Front, mean_weight_bits, predicted_error
from dq_plugins.passes.allocation.problem import Allocation, AllocationProblem
from dq_plugins.plan import QuantPlan
from dq_plugins.quantized.candidates import Operand
from dq_plugins.quantized.width import OPERANDS
from dq_plugins.solvers.solution import Use

SECTION = "bit-allocation"


@dataclass(frozen=True)
class LayerReason:
    """One operand of one layer.

    Attributes:
        layer: fully qualified name.
        operand: ``"weight"`` or ``"activation"``.
        bits: chosen width; None is full precision.
        share: its part of the plan's predicted error.
        bytes: packed bytes (weights) or bits of the input over 8 (activations).
        floor: error at the narrowest of its choices, relative to the plan's whole error: how much it would hurt.
        more_bits: the next wider of its choices; None when there is none, or it is full precision.
        saved: part of the plan's predicted error that the next wider width would save.
        extra: bytes that it would cost.
    """

    layer: str
    operand: Operand
    bits: int | None
    share: float
    bytes: int
    floor: float
    more_bits: int | None = None
    saved: float = 0.0
    extra: int = 0

    @property
    def why(self) -> str:
        """One sentence."""
        name = "full precision" if self.bits is None else f"{self.bits} bits"
        if self.floor > 1:
            hurt = f"the narrowest width alone would multiply the plan's error by {1 + self.floor - self.share:.3g}"
        else:
            hurt = f"at the narrowest width it would make {self.floor:.1%} of the plan's error"
        if not self.extra:
            return f"{name}, its widest choice: {hurt}"
        wider = "full precision" if self.more_bits is None else f"{self.more_bits} bits"
        return f"{name}: {hurt}; {wider} would save {self.saved:.2%} of the error for {self.extra:,} bytes"


def explain(allocation: Allocation) -> list[LayerReason]:
    """Reasons for every operand of every layer that had a choice or was quantized, the costliest to narrow first."""
    problem, widths = allocation.problem, allocation.widths
    total = allocation.error or 1.0
    reasons = [
        _reason(problem, layer, operand, getattr(width, operand), total)
        for layer, width in widths.items()
        for operand in (OPERANDS if problem.layers[layer].inputs else OPERANDS[:1])
        if getattr(width, operand) is not None or len(getattr(problem.choices_for(layer), operand)) > 1
    ]
    return sorted(reasons, key=lambda r: (-r.floor, r.layer, r.operand))


def _reason(problem: AllocationProblem, layer: str, operand: Operand, bits: int | None, total: float) -> LayerReason:
    # narrowest first, full precision last
    choices = sorted(getattr(problem.choices_for(layer), operand), key=problem.bits)
    cost = problem.layers[layer]
    count = cost.weights if operand == "weight" else cost.inputs

    def size(width: int | None) -> int:
        return -(-count * problem.bits(width) // 8)

    error = problem.error(layer, operand, bits)
    floor = problem.error(layer, operand, choices[0]) / total
    reason = LayerReason(layer, operand, bits, error / total, size(bits), floor)
    wider = choices[choices.index(bits) + 1 :]
    if not wider:
        return reason
    saved = (error - problem.error(layer, operand, wider[0])) / total
    return replace(reason, more_bits=wider[0], saved=saved, extra=size(wider[0]) - size(bits))


def table_of_reasons(reasons: Sequence[LayerReason], limit: int | None = None) -> str:
    """The reasons as text, one line each, at most so many."""
    shown = list(reasons if limit is None else reasons[:limit])
    width = max((len(f"{r.layer}.{r.operand}") for r in shown), default=0)
    lines = [f"{f'{r.layer}.{r.operand}':<{width}}  {r.why}" for r in shown]
    if len(shown) < len(reasons):
        lines.append(f"... and {len(reasons) - len(shown)} more, each with less effect")
    return "\n".join(lines)


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
        predicted_noise_power: sum of the noise powers of the chosen widths.
        widths: by layer, such as ``W4A8``.
        reasons: why each, costliest to narrow first.
        objective: ``"image"``, ``"noise-power"`` or ``"mixdq"``.
        predicted_image_error: mean square error of the final image, if that was the objective. ``error`` and
            ``bound`` are then those of the program that is linear around another plan.
        fronts: by rule, mean weight bits and error of each point, if they were asked for.
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
    objective: str = "noise-power"
    predicted_image_error: float | None = None
    fronts: dict[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    couplings: dict[str, float] | None = None
    content: tuple[str, ...] | None = None


def findings_of(allocation: Allocation, fronts: Sequence[Front], **found: Any) -> AllocationFindings:
    """What to keep of an allocation; ``found``: further fields, such as the noise power if it was not the objective."""
    solution, problem = allocation.solution, allocation.problem
    as_they_are = {name: getattr(solution, name) for name in ("status", "bound", "gap", "tolerance", "solver")}
    return AllocationFindings(
        **as_they_are,
        error=solution.objective,
        binding=tuple(solution.binding),
        budgets=tuple(solution.uses),
        mean_weight_bits=mean_weight_bits(problem, allocation.widths),
        widths={name: str(width) for name, width in allocation.widths.items()},
        reasons=tuple(explain(allocation)),
        fronts={front.rule: front.points for front in fronts},
        **({"predicted_noise_power": predicted_error(problem, allocation.widths)} | found),
    )


def find(plan: QuantPlan) -> AllocationFindings | None:
    """The findings in a plan; None: no bit allocation made it."""
    section = plan.sections.get(SECTION)
    return None if section is None else section.read(AllocationFindings, SECTION)


def explanation(plan: QuantPlan, limit: int | None = None) -> str:
    """The reasons that a plan made by ``bit-allocation`` holds: what the solver says, then one line an operand.

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
