"""The step policy of serving engines: how many of the first and the last steps of sampling keep inputs in 16 bits.

Engines read it from ``quantization_config.runtime.diffusion_step_policy`` of a transformer's ``config.json``
(diffusers#14664, vllm-omni#6560, sglang#36380; schema version 1, type ``first_last_n``). They count denoising steps; a
plan selects by the value of t, so a policy becomes timestep groups at the timesteps of the plan's schedule, and is read
back from those. With another number of steps the two differ.

In a plan, a step in 16 bits is one at which the input of every layer stays in floating point
(`dq_plugins.plan.ActivationQuant.group_bits`); weights keep their codes. Steps with wider inputs instead, which stay in
integers, engines have no policy for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from dq_plugins.errors import PlanError
from dq_plugins.plan.dynamic_ranges import DynamicActivationQuant
from dq_plugins.plan.layers import ActivationQuant, InputQuant, LayerPlan
from dq_plugins.plan.quant_plan import QuantPlan
from dq_plugins.timesteps import TimestepGroups

Mode = Literal["a16", "native"]
FIXED = {
    "schema_version": 1,
    "type": "first_last_n",
    "index_space": "denoising_loop_iteration",
    "default_mode": "native",
}
EXCEPTIONS = "step-exceptions"
"""Timestep groups of widths of dynamic ranges: the steps of a policy, and those between."""
KEYS = {*FIXED, "scope", "first_steps", "last_steps", "overlap", "reasoner"}


@dataclass(frozen=True)
class StepPolicy:
    """First and last steps with inputs in 16 bits.

    Attributes:
        first: number of the first steps.
        last: number of the last ones.
        scope: components that it is for.
        overlap: what steps are that are among both.
        reasoner: what a part is that runs once before the steps, where a model has one.

    Example:
        >>> StepPolicy.of(StepPolicy(3, 2).as_data())
        StepPolicy(first=3, last=2, scope=('transformer',), overlap='a16', reasoner='native')
    """

    first: int = 0
    last: int = 0
    scope: tuple[str, ...] = ("transformer",)
    overlap: Mode = "a16"
    reasoner: Mode = "native"

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise PlanError(f"a step policy counts {name} steps from 0, got {count!r}")
        if not self.scope or {self.overlap, self.reasoner} - {"a16", "native"}:
            raise PlanError(f"a step policy has a scope, and modes that are 'a16' or 'native', got {self}")

    def as_data(self) -> dict[str, Any]:
        """The value of ``diffusion_step_policy``."""
        return FIXED | {
            "scope": list(self.scope),
            "first_steps": {"count": self.first, "mode": "a16"},
            "last_steps": {"count": self.last, "mode": "a16"},
            "overlap": self.overlap,
            "reasoner": self.reasoner,
        }

    @classmethod
    def of(cls, data: Any) -> StepPolicy:
        """The policy that `as_data` gave, or an engine's checkpoint holds.

        Raises:
            PlanError: it is of another schema; the message says what is.
        """
        if not isinstance(data, Mapping) or set(data) != KEYS:
            differing = sorted(KEYS ^ set(data)) if isinstance(data, Mapping) else [type(data).__name__]
            raise PlanError(f"a diffusion_step_policy has the fields {sorted(KEYS)}; missing or unknown: {differing}")
        for name, value in FIXED.items():
            if data[name] != value or type(data[name]) is not type(value):
                raise PlanError(f"diffusion_step_policy: {name} is {data[name]!r}, and only {value!r} is known")
        ends = []
        for name in ("first_steps", "last_steps"):
            end = data[name]
            if not isinstance(end, Mapping) or set(end) != {"count", "mode"} or end["mode"] != "a16":
                raise PlanError(f"diffusion_step_policy: {name} is a count of steps in mode 'a16', got {end!r}")
            ends.append(end["count"])
        scope = data["scope"]
        if not isinstance(scope, list | tuple) or not all(isinstance(each, str) for each in scope):
            raise PlanError(f"diffusion_step_policy: scope is a list of components, got {scope!r}")
        return cls(*ends, tuple(scope), data["overlap"], data["reasoner"])

    def into(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint's ``quantization_config`` with this policy."""
        runtime = {**quantization_config.get("runtime", {}), "diffusion_step_policy": self.as_data()}
        return {**quantization_config, "runtime": runtime}

    @classmethod
    def from_config(cls, quantization_config: Mapping[str, Any] | None) -> StepPolicy | None:
        """The policy of a checkpoint's ``quantization_config``; None: it has none."""
        runtime = (quantization_config or {}).get("runtime") or {}
        return cls.of(runtime["diffusion_step_policy"]) if "diffusion_step_policy" in runtime else None

    def high(self, steps: int) -> list[bool]:
        """Which of so many steps are in 16 bits. A run of one step never is, as engines have it."""
        first, last = ([i < self.first for i in range(steps)], [i >= steps - self.last for i in range(steps)])
        both = self.overlap == "a16"
        return [(a or b) and (both or not (a and b)) and steps > 1 for a, b in zip(first, last, strict=True)]


def with_policy(plan: QuantPlan, policy: StepPolicy, wide: Mapping[str, InputQuant] | None = None) -> QuantPlan:
    """A plan that keeps the inputs of all layers in floating point at the steps that a policy says, or in more bits.

    Args:
        plan: left as it is. Its timestep groups are split where the policy's steps end.
        policy: counted over `QuantPlan.visited`.
        wide: in place of floating point, by layer: quantizers of one width, with ranges by the groups of the plan or
            dynamic ones as it has them. Other layers stay as they are.

    Raises:
        PlanError: a layer has dynamic ranges, whose widths groups may tell apart, but not leave in floating point;
            or sampling visits a timestep twice.
    """
    visited = plan.visited.timesteps
    if len(set(visited)) < len(visited):
        raise PlanError("sampling visits a timestep twice, so steps cannot be told apart by their timestep")
    if wide is None and any(policy.high(len(visited))):
        _refuse_dynamic(plan)
    high = dict(zip(visited, policy.high(len(visited)), strict=True))
    ordered = sorted(visited)
    edges = [(a + b) / 2 for a, b in pairwise(ordered) if high[a] != high[b]]
    low, top = plan.schedule.sorted[0], plan.schedule.sorted[-1]
    bounds = next(iter(plan.groups.values()), TimestepGroups(low=low, high=top))
    split = {} if wide is None else {EXCEPTIONS: replace(bounds, edges=tuple(edges))}
    rows = {EXCEPTIONS: torch.zeros(1 if wide is None else len(edges) + 1, dtype=torch.int64)}
    for name, groups in plan.groups.items():
        split[name] = replace(groups, edges=tuple(sorted({*groups.edges, *edges})))
        rows[name] = _rows(groups, split[name])
    kept = {name: {groups.of(t) for t in visited if high[t]} for name, groups in split.items()}
    shared = {n: tuple(plan.shared_rows[n][r] for r in rows[n].tolist()) for n in plan.shared_rows}
    layers = {
        name: _split(layer, rows, kept, floating=wide is None, wider=None if wide is None else wide.get(name))
        for name, layer in plan.layers.items()
    }
    attention = {
        name: replace(each, **{o: _table(q, rows[q.groups]) for o, q in each.quantizers.items()})
        for name, each in plan.attention.items()
    }
    return replace(plan, groups=split, shared_rows=shared, layers=layers, attention=attention).validate()


def _refuse_dynamic(plan: QuantPlan) -> None:
    for name, layer in plan.layers.items():
        if layer.dynamic:
            raise PlanError(
                f"layer {name!r} has dynamic ranges, and these have no steps in floating point. Give steps more bits "
                "instead (pass 'step-exceptions' with bits=8)"
            )


def policy_of(plan: QuantPlan) -> StepPolicy:
    """The policy that a plan follows.

    Raises:
        PlanError: other steps than the first and last are in floating point, or of some layers only.
    """
    visited = plan.visited.timesteps
    tables = {n: a for n, p in plan.layers.items() if isinstance(a := p.activation, ActivationQuant)}
    floating = [
        {name for name, quant in tables.items() if quant.widths[plan.groups[quant.groups].of(t)] is None}
        for t in visited
    ]
    for t, names in zip(visited, floating, strict=True):
        if names and (others := sorted(tables.keys() - names)):
            raise PlanError(
                f"at timestep {t:g} the input of {sorted(names)[0]!r} is in floating point and that of {others[0]!r} "
                "is not: a step policy is for whole steps"
            )
    high = [bool(names) for names in floating]
    first = next((i for i, each in enumerate(high) if not each), len(high))
    last = next((i for i, each in enumerate(reversed(high)) if not each), len(high) - first)
    if any(high[first : len(high) - last]):
        raise PlanError(
            "the plan keeps steps in the middle of sampling in floating point; a step policy has the first and the last"
        )
    return StepPolicy(first, last)


def _rows(old: TimestepGroups, new: TimestepGroups) -> Tensor:
    """Old group of every new one, ``[G']``."""
    starts = [float("-inf"), *new.edges]
    return torch.tensor([sum(edge <= start for edge in old.edges) for start in starts])


def _table(
    quant: ActivationQuant, rows: Tensor, kept: Iterable[int] = (), wider: ActivationQuant | None = None
) -> ActivationQuant:
    """The table of new groups; in those ``kept``, what ``wider`` has in the old one, or floating point."""
    widths: list[int | None] = [quant.widths[row] for row in rows.tolist()]
    scale, zero_point = quant.scale[rows], quant.zero_point[rows]
    for group in kept:
        widths[group] = None if wider is None else wider.bits
        if wider is not None:
            scale[group], zero_point[group] = wider.scale[rows[group]], wider.zero_point[rows[group]]
    if all(width == quant.bits for width in widths):
        return replace(quant, scale=scale, zero_point=zero_point, group_bits=None)
    bits = max((width for width in widths if width is not None), default=quant.bits)
    # unused there, and it may be none of the codes that are left
    zero_point = zero_point.masked_fill(torch.tensor([width is None for width in widths]), 0)
    return ActivationQuant(bits, quant.groups, scale, zero_point, tuple(widths))


def _split(
    layer: LayerPlan,
    rows: Mapping[str, Tensor],
    kept: Mapping[str, Iterable[int]],
    *,
    floating: bool,
    wider: InputQuant | None,
) -> LayerPlan:
    """A layer for new groups: those ``kept`` in floating point, or as ``wider`` has them, where it is given."""
    activation, correction = layer.activation, layer.bias_correction
    if isinstance(activation, ActivationQuant):
        assert wider is None or isinstance(wider, ActivationQuant)
        chosen = kept[activation.groups] if floating or wider is not None else ()
        activation = _table(activation, rows[activation.groups], chosen, wider)
    elif activation is not None:
        groups = activation.groups or EXCEPTIONS
        activation = _by_steps(activation, groups, rows[groups], () if wider is None else kept[groups], wider)
    if correction is not None and correction.groups is not None:
        correction = replace(correction, values=correction.values[rows[correction.groups]])
    return replace(layer, activation=activation, bias_correction=correction)


def _by_steps(
    quant: DynamicActivationQuant, groups: str, rows: Tensor, kept: Iterable[int], wider: InputQuant | None
) -> DynamicActivationQuant:
    """Dynamic ranges for new groups; those of ``wider``, which has no groups, in those that are ``kept``."""
    forms = [quant.forms[row if quant.groups else 0] for row in rows.tolist()]
    for group in kept:
        assert isinstance(wider, DynamicActivationQuant)
        forms[group] = wider.forms[0]
    return quant.in_groups(groups, forms)
