"""Plan <-> folder: ``plan.json`` (schema-validated, sorted, diffable) and ``plan.safetensors``.

Same plan, same bytes. Both files are written beside their final place and moved, so an interrupted save leaves
the old plan whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from dq_plugins.atomic import write_atomically
from dq_plugins.errors import PlanError
from dq_plugins.plan.encoding import check_format, decode_plan, encode_plan
from dq_plugins.plan.plan import QuantPlan

JSON_NAME, TENSORS_NAME = "plan.json", "plan.safetensors"


def save_plan(plan: QuantPlan, folder: str | Path) -> Path:
    """Validate and write a plan.

    Returns:
        The folder.

    Raises:
        PlanError: the plan contradicts itself.
    """
    record, tensors = encode_plan(plan)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TENSORS_NAME, safetensors.torch.save(tensors))
    write_atomically(
        folder / JSON_NAME, (json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    )
    return folder


def load_plan(folder: str | Path) -> QuantPlan:
    """Read and validate a plan.

    Raises:
        PlanError: files missing, damaged, altered, of a newer format, or contradicting each other.
    """
    folder = Path(folder)
    record = _read_record(folder / JSON_NAME)
    check_format(record, str(folder))
    return decode_plan(record, _read_tensors(folder / TENSORS_NAME), str(folder))


def _read_record(path: Path) -> Any:
    if not path.is_file():
        raise PlanError(f"no plan at {path.parent}: {path.name} is missing")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not JSON: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(path.read_bytes())
    except Exception as error:  # safetensors raises its own type, OSError, ValueError: all mean the same here
        raise PlanError(f"{path} cannot be read as safetensors: {error}. The plan is incomplete or damaged.") from error
