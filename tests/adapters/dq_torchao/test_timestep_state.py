from __future__ import annotations

import copy

import dq_torchao
import pytest
import torch
from dq_torchao.timestep_state import TimestepState
from torchao_models import Denoiser, denoiser_plan

from dq_plugins.errors import TimestepError
from dq_plugins.hashing import weights_hash
from dq_plugins.timesteps import TimestepContext, TimestepGroups, context_of

GROUPS = {"all": TimestepGroups((300.0, 700.0), low=0.0), "a.b_c": TimestepGroups()}


def test_edges_and_bounds_are_in_the_state_dict():
    state = TimestepState(TimestepContext(GROUPS)).state_dict()
    assert state["all_edges"].tolist() == [300.0, 700.0]
    assert state["all_bounds"].tolist() == [0.0, float("inf")]
    assert len(state) == 4


def test_names_that_only_differ_in_dots_and_underscores_stay_apart():
    names = ("a.b", "a_b", "a_db", "a._b", "a_.b")
    assert len(TimestepState(TimestepContext(dict.fromkeys(names, TimestepGroups()))).state_dict()) == 2 * len(names)


def test_loading_a_state_dict_moves_the_edges_that_layers_are_routed_by():
    early, late = (Denoiser().eval(), Denoiser().eval())
    late.load_state_dict(early.state_dict())
    for model, edges in ((early, (300.0, 700.0)), (late, (850.0, 950.0))):
        dq_torchao.apply(model, denoiser_plan(model, TimestepGroups(edges)))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(800.0)
    expected = late(x, t)
    assert not torch.equal(early(x, t), expected)
    early.load_state_dict(late.state_dict())
    assert torch.equal(early(x, t), expected)


def test_edges_that_do_not_ascend_are_refused():
    state = TimestepState(TimestepContext(dict(GROUPS)))
    with pytest.raises(TimestepError, match="ascend"):
        state.load_state_dict(state.state_dict() | {"all_edges": torch.tensor([700.0, 300.0])})


def test_edges_survive_a_cast_and_copies_are_independent():
    model = Denoiser().eval()
    dq_torchao.apply(model, denoiser_plan(model, TimestepGroups((300.3, 700.7))))
    clone = copy.deepcopy(model).to(torch.bfloat16)
    assert clone.dq_timestep_groups.all_edges.tolist() == [300.3, 700.7]
    assert clone.dq_timestep_groups.context is context_of(clone) is not context_of(model)


def test_groups_are_no_weights_of_the_denoiser():
    model = Denoiser()
    before = weights_hash(model)
    model.add_module("dq_timestep_groups", TimestepState(TimestepContext(GROUPS)))
    assert weights_hash(model) == before
