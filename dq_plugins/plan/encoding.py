"""Plan <-> its JSON record and its named tensors, hashed together.

The record holds the fields of `QuantPlan`, the version of the format, and the hash of the tensors; the plan's own hash
is that of the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from dq_plugins.errors import DQError, PlanError
from dq_plugins.hashing import hash_json, hash_tensors
from dq_plugins.plan.codec import decode, encode
from dq_plugins.plan.plan import QuantPlan

FORMAT_VERSION = 3


@cache
def _adapter() -> TypeAdapter[QuantPlan]:
    return TypeAdapter(QuantPlan)


def plan_schema() -> dict[str, Any]:
    """JSON schema of the record's fields, for other programs that read plans."""
    return _adapter().json_schema()


def encode_plan(plan: QuantPlan) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A valid plan as what its two files hold: the JSON record, and the named tensors.

    Raises:
        PlanError: the plan contradicts itself.
    """
    return _encode(plan.validate())


def _encode(plan: QuantPlan) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    fields = encode(plan, "", tensors)
    return {"format_version": FORMAT_VERSION, "tensors_hash": hash_tensors(tensors), **fields}, tensors


def plan_hash(plan: QuantPlan) -> str:
    """sha256 of the JSON record, which holds the hash of the tensors."""
    return hash_json(_encode(plan)[0])


def check_format(raw: Any, where: str) -> None:
    """Raise `PlanError` unless JSON data is the record of a plan in the format of today."""
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if not isinstance(version, int) or not isinstance(raw.get("tensors_hash"), str):
        raise PlanError(f"{where} is not a valid plan: it lacks format_version or tensors_hash")
    if version != FORMAT_VERSION:
        advice = "Upgrade dq-plugins." if version > FORMAT_VERSION else "Make the plan again."
        raise PlanError(f"{where} has plan format {version}; this dq-plugins reads format {FORMAT_VERSION}. {advice}")


def decode_plan(raw: Any, tensors: Mapping[str, Tensor], where: str, *, placeholders: bool = False) -> QuantPlan:
    """The plan that `encode_plan` took apart.

    Args:
        raw: the JSON record.
        tensors: by name.
        where: what it was read from, for messages.
        placeholders: the tensors have the right shapes but not the values, which a checkpoint holds elsewhere.

    Raises:
        PlanError: not a plan, of another format, with other tensors, or contradicting itself.
    """
    check_format(raw, where)
    if not placeholders and hash_tensors(tensors) != raw["tensors_hash"]:
        raise PlanError(f"{where}: the tensors do not belong to the record beside them, or were altered: hash differs")
    fields = {key: value for key, value in raw.items() if key not in ("format_version", "tensors_hash")}
    plan: QuantPlan = decode(_adapter(), fields, tensors, f"{where} is not a valid plan")
    try:
        return plan.validate()
    except DQError as error:
        raise PlanError(f"the plan in {where} contradicts itself: {error}") from error
