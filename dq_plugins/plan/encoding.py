"""Plan <-> its JSON record and its named tensors; see `dq_plugins.plan.schema` for the format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from dq_plugins.errors import DQError, PlanError
from dq_plugins.hashing import hash_json, hash_tensors
from dq_plugins.plan.layers import ActivationQuant, LayerPlan, WeightQuant
from dq_plugins.plan.plan import PassRecord, QuantPlan, Section
from dq_plugins.plan.schema import FORMAT_VERSION, LayerRecord, PlanRecord
from dq_plugins.timesteps import Schedule, TimestepGroups


def encode_plan(plan: QuantPlan) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A valid plan as what its two files hold: the JSON record, and the named tensors.

    Raises:
        PlanError: the plan contradicts itself.
    """
    tensors = _tensors(plan.validate())
    return _record(plan, tensors).model_dump(mode="json"), tensors


def plan_hash(plan: QuantPlan) -> str:
    """sha256 of the JSON record, which holds the hash of the tensors."""
    return hash_json(_record(plan, _tensors(plan)).model_dump(mode="json"))


def _tensors(plan: QuantPlan) -> dict[str, Tensor]:
    tensors: dict[str, Tensor | None] = {}
    for name, layer in plan.layers.items():
        if layer.weight:
            for part in ("scale", "zero_point", "codes"):
                tensors[f"layers/{name}/weight.{part}"] = getattr(layer.weight, part)
        if layer.activation:
            for part in ("scale", "zero_point"):
                tensors[f"layers/{name}/activation.{part}"] = getattr(layer.activation, part)
    for name, section in plan.sections.items():
        tensors |= {f"sections/{name}/{key}": value for key, value in section.tensors.items()}
    # clone: views of one storage cannot be written side by side, and a slice would drag its whole storage along
    return {key: t.detach().cpu().clone().contiguous() for key, t in sorted(tensors.items()) if t is not None}


def _record(plan: QuantPlan, tensors: dict[str, Tensor]) -> PlanRecord:
    return PlanRecord.model_validate(
        {
            "format_version": FORMAT_VERSION,
            "model": plan.model,
            "model_hash": plan.model_hash,
            "timestep_argument": plan.timestep_argument,
            "schedule": list(plan.schedule.timesteps),
            "sampling": plan.sampling and list(plan.sampling.timesteps),
            "groups": {
                name: {"edges": list(g.edges), "low": _bound(g.low), "high": _bound(g.high)}
                for name, g in plan.groups.items()
            },
            "layers": {name: _layer_record(layer) for name, layer in plan.layers.items()},
            "sections": {
                name: {"data": s.data, "tensors": sorted(s.tensors), "critical": s.critical}
                for name, s in plan.sections.items()
            },
            "passes": [{"name": p.name, "options": dict(p.options)} for p in plan.passes],
            "recipe": plan.recipe,
            "seed": plan.seed,
            "tensors_hash": hash_tensors(tensors),
        }
    )


def _layer_record(layer: LayerPlan) -> dict[str, Any]:
    weight, activation = layer.weight, layer.activation
    return {
        "kind": layer.kind,
        "roles": sorted(layer.roles),
        "weight": weight
        and {
            "bits": weight.bits,
            "symmetric": weight.symmetric,
            "learned_rounding": weight.codes is not None,
            "scheme": weight.scheme,
        },
        "activation": activation and {"bits": activation.bits, "groups": activation.groups},
        "kept": layer.kept,
    }


def _bound(value: float) -> float | None:
    return value if math.isfinite(value) else None


def decode_plan(raw: Any, tensors: Mapping[str, Tensor], where: str) -> QuantPlan:
    """The plan that `encode_plan` took apart.

    Args:
        raw: the JSON record.
        tensors: by name, of the right shapes. Their hash is not compared, so that a checkpoint, which holds the values
            elsewhere, can rebuild the structure from placeholders.
        where: what it was read from, for messages.

    Raises:
        PlanError: not a plan, of a newer format, or contradicting itself.
    """
    return plan_of(parse_record(raw, where), tensors, where)


def parse_record(raw: Any, where: str) -> PlanRecord:
    """The record that JSON data holds.

    Raises:
        PlanError: it is no plan, or of a newer format.
    """
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise PlanError(
            f"{where} has plan format {version}; this dq-plugins reads up to {FORMAT_VERSION}. Upgrade dq-plugins."
        )
    try:
        return PlanRecord.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise PlanError(f"{where} is not a valid plan: at {place}: {first['msg']}") from error


def plan_of(record: PlanRecord, tensors: Mapping[str, Tensor], where: str) -> QuantPlan:
    """The plan that a record and its tensors describe; ``where`` says in messages what they were read from.

    Raises:
        PlanError: they contradict each other.
    """
    try:
        return QuantPlan(
            model=record.model,
            model_hash=record.model_hash,
            timestep_argument=record.timestep_argument,
            schedule=Schedule(tuple(record.schedule)),
            sampling=None if record.sampling is None else Schedule(tuple(record.sampling)),
            groups={
                name: TimestepGroups(
                    tuple(g.edges),
                    -math.inf if g.low is None else g.low,
                    math.inf if g.high is None else g.high,
                )
                for name, g in record.groups.items()
            },
            layers={name: _layer(name, layer, tensors) for name, layer in record.layers.items()},
            sections={
                name: Section(s.data, {key: tensors[f"sections/{name}/{key}"] for key in s.tensors}, s.critical)
                for name, s in record.sections.items()
            },
            passes=[PassRecord(p.name, p.options) for p in record.passes],
            recipe=record.recipe,
            seed=record.seed,
        ).validate()
    except (DQError, KeyError) as error:
        raise PlanError(f"the plan in {where} contradicts itself: {error}") from error


def _layer(name: str, record: LayerRecord, tensors: Mapping[str, Tensor]) -> LayerPlan:
    def get(part: str) -> Tensor:
        key = f"layers/{name}/{part}"
        if key not in tensors:
            raise PlanError(f"the plan lacks tensor {key!r}")
        return tensors[key]

    weight = activation = None
    if record.weight is not None:
        weight = WeightQuant(
            bits=record.weight.bits,
            scale=get("weight.scale"),
            zero_point=None if record.weight.symmetric else get("weight.zero_point"),
            codes=get("weight.codes") if record.weight.learned_rounding else None,
            scheme=record.weight.scheme,
        )
    if record.activation is not None:
        activation = ActivationQuant(
            bits=record.activation.bits,
            groups=record.activation.groups,
            scale=get("activation.scale"),
            zero_point=get("activation.zero_point"),
        )
    return LayerPlan(record.kind, frozenset(record.roles), weight, activation, record.kept)
