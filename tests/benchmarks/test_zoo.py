"""The zoo knows every denoiser of diffusers; representatives of what used to fail go through all stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.zoo import foreign_sequences, foreign_unets
from benchmarks.zoo.foreign import FOREIGN
from benchmarks.zoo.specimen import Specimen
from benchmarks.zoo.specimens import every_specimen, takes_timestep
from benchmarks.zoo.stages import STAGES, run_stages
from benchmarks.zoo.table import rows


def test_every_denoiser_of_diffusers_has_a_specimen() -> None:
    found = list(every_specimen())
    assert len(found) > 100
    assert len({name for _, name, _, _ in found}) == len(found)
    assert not takes_timestep(nn.Linear)


REPRESENTATIVES = [
    foreign_unets.PolicyUNet,  # 1-d and transposed convolutions
    foreign_unets.VideoNet,  # 3-d convolutions, a timestep per frame
    foreign_sequences.TokenTimes,  # a timestep per token
    foreign_sequences.Tabular,  # a subclass of nn.Linear, a 1-d parameter called weight
    foreign_sequences.Batch,  # the timestep inside an argument
]


@pytest.mark.parametrize("cls", REPRESENTATIVES, ids=lambda cls: cls.__name__)
def test_representatives_go_through_all_stages(cls: type[nn.Module]) -> None:
    found = run_stages(cls.__name__, cls, FOREIGN[cls])
    assert (found.failed, found.error) == ("", "")
    assert not found.other, "something does not run in integers"
    assert found.integer_error < 1e-4
    assert 0 < found.quantized_error < 0.2


STAYS = {
    foreign_sequences.Recurrent: (2, "a recurrent layer"),
    foreign_unets.ScoreNet: (4, "multiplies by parameters that are not a layer's weight"),
    foreign_sequences.Experts: (7, "no token chose"),  # empty inputs
    foreign_sequences.Branches: (3, "never runs it"),  # a Python if on the timestep, layers called by keyword
}


@pytest.mark.parametrize("cls", STAYS, ids=lambda cls: cls.__name__)
def test_what_stays_is_named_with_its_reason(cls: type[nn.Module]) -> None:
    count, reason = STAYS[cls]
    found = run_stages(cls.__name__, cls, FOREIGN[cls])
    assert (found.failed, found.error, found.integer) == ("", "", count)
    assert [number for text, number in found.other.items() if reason in text] == [1]


class Broken(nn.Module):
    """Fails in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of | order")


@pytest.mark.parametrize("outside", [{}, {"call": "a bug of its own"}])
def test_a_stage_that_fails_is_a_row(outside: dict[str, str]) -> None:
    inputs: Any = lambda: {"x": torch.zeros(1, 4), "t": torch.ones(1)}  # noqa: E731
    found = run_stages("Broken", Broken, Specimen({}, inputs, outside=outside))
    assert (found.failed, found.outside) == ("call", bool(outside))
    row = next(rows({"Broken": {"family": "f", **found.record()}}, "f"))
    assert row.count("|") == 8
    assert f"{STAGES.index('call')}, then `call`" in row
    assert ("a bug of its own" if outside else "out of / order") in row
