from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from plans import example_plan

from dq_plugins.artifact import StoredTensor
from dq_plugins.errors import PlanError
from dq_plugins.plan import QuantPlan, Section


@dataclass
class Tilt:
    """What a pass of another package decides."""

    angle: float
    matrix: StoredTensor
    layers: tuple[str, ...] = ()


def test_a_pass_keeps_a_dataclass_of_its_own(tmp_path: Path) -> None:
    plan = example_plan()
    plan.sections["tilt"] = Section.of(Tilt(0.5, torch.eye(2), ("a",)), critical=True)
    loaded = QuantPlan.load(plan.save(tmp_path))
    assert loaded == plan
    found = loaded.sections["tilt"].read(Tilt, "tilt")
    assert (found.angle, found.layers) == (0.5, ("a",))
    assert torch.equal(found.matrix, torch.eye(2))
    assert "tilt" in loaded.features


def test_other_content_is_refused_and_the_message_names_the_place() -> None:
    section = Section.of(Tilt(0.5, torch.eye(2)))
    section.data["angle"] = "steep"
    with pytest.raises(PlanError, match="section 'tilt' of the plan: at angle"):
        section.read(Tilt, "tilt")
