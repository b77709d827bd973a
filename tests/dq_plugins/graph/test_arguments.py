from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from odd_denoisers import Quarry, TwoLayers
from torch import nn

from dq_plugins.errors import TimestepError, TraceError
from dq_plugins.graph.arguments import (
    TIMESTEP_NAMES,
    argument_names,
    check_inputs,
    find_timestep_argument,
    map_leaves,
    named_leaves,
    number_to_tensor,
    root,
)


def with_forward(source: str) -> nn.Module:
    scope: dict = {}
    exec(f"def forward(self, {source}): ...", scope)
    return type("Odd", (nn.Module,), {"forward": scope["forward"]})()


@pytest.mark.parametrize("name", TIMESTEP_NAMES)
def test_usual_names_are_found_wherever_they_stand(name):
    assert find_timestep_argument(with_forward(f"x, context=None, *, {name}=None")) == name


def test_the_most_specific_of_several_usual_names_wins():
    assert find_timestep_argument(with_forward("x, t, sigma, timestep")) == "timestep"


def test_a_given_name_wins_over_the_usual_ones():
    assert find_timestep_argument(with_forward("x, when, t"), "when") == "when"


def test_no_timestep_says_which_arguments_were_seen_and_how_to_name_one():
    with pytest.raises(TimestepError, match=r"Odd\.forward.*image, prompt.*timestep='\.\.\.'.*--timestep"):
        find_timestep_argument(with_forward("image, prompt"))


def test_a_given_name_that_is_no_argument_is_refused():
    with pytest.raises(TimestepError, match="no argument 'when'.*image, t"):
        find_timestep_argument(with_forward("image, t"), "when")


def test_a_wrapper_on_the_instance_does_not_hide_the_signature():
    model = Quarry()
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert argument_names(model) == ("noisy", "noise_level", "words")


def test_a_forward_that_only_the_instance_names_is_read():
    model = with_forward("*args, **kwargs")
    model.forward = lambda x, sigma: x
    assert find_timestep_argument(model) == "sigma"


def test_a_compiled_denoiser_is_looked_into():
    assert find_timestep_argument(torch.compile(Quarry())) == "noise_level"


def test_leaves_have_dotted_names_and_come_back_in_the_same_nesting():
    Pair = namedtuple("Pair", "a b")
    inputs = {"x": 1, "cond": {"ids": [2, (3, 4)], "pair": Pair(5, None)}}
    assert dict(named_leaves(inputs)) == {
        "x": 1, "cond.ids.0": 2, "cond.ids.1.0": 3, "cond.ids.1.1": 4, "cond.pair.0": 5, "cond.pair.1": None,
    }  # fmt: skip
    mapped = map_leaves(inputs, lambda name, value: name)
    assert mapped["cond"]["ids"] == ["cond.ids.0", ("cond.ids.1.0", "cond.ids.1.1")]
    assert mapped["cond"]["pair"] == Pair("cond.pair.0", "cond.pair.1")
    assert root("cond.ids.0") == "cond"


def test_only_a_number_for_the_timestep_becomes_a_tensor():
    inputs = number_to_tensor({"x": 2, "t": 5, "flag": True}, "t")
    assert inputs["x"] == 2
    assert inputs["flag"] is True
    assert inputs["t"].dtype == torch.int64
    assert inputs["t"].shape == ()
    assert number_to_tensor({"t": True}, "t") == {"t": True}


def test_unknown_arguments_and_inputs_without_tensors_are_refused():
    with pytest.raises(TraceError, match="no argument 'latent'.*x, t"):
        check_inputs(TwoLayers(), {"latent": torch.zeros(1)})
    with pytest.raises(TraceError, match=r"hold no tensor.*x, t"):
        check_inputs(TwoLayers(), {"x": 1, "t": 2})
