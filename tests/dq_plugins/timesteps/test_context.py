import copy
import pickle
import threading

import pytest
import torch

from dq_plugins.errors import TimestepError
from dq_plugins.timesteps import TimestepContext, TimestepGroups

GROUPS = TimestepGroups((300.0, 600.0), low=0.0, high=1000.0)


def context(**options) -> TimestepContext:
    return TimestepContext({"g": GROUPS}, **options)


def selected(timestep, **options) -> list:
    known = context(**options)
    with known.select(timestep):
        return known.index("g").tolist()


def test_equal_timesteps_select_once() -> None:
    assert selected(400) == [1]
    assert selected(torch.tensor([400, 400, 400])) == [1]
    assert selected(torch.tensor([400, 400, 700])) == [1, 1, 2]


def test_tokens_select_their_own_unless_they_are_all_alike() -> None:
    assert selected(torch.tensor([[0, 400], [700, 0]])) == [[0, 1], [2, 0]]
    assert selected(torch.tensor([[400, 400], [700, 700]])) == [1, 2]
    assert selected(torch.tensor([[400], [700]])) == [1, 2]


def test_a_timestep_of_more_dimensions_is_one_per_frame() -> None:
    assert selected(torch.tensor([400, 700]).reshape(1, 1, 2, 1, 1)) == [[1, 2]]
    assert selected(torch.tensor([400, 700]).reshape(2, 1, 1, 1, 1)) == [1, 2]


@pytest.mark.parametrize("timesteps", [[100, 900], [[100, 900], [100, 100]]])
def test_a_uniform_context_refuses_different_timesteps(timesteps: list) -> None:
    assert selected(torch.full((2, 2), 400), uniform=True) == [1]
    with pytest.raises(RuntimeError, match="different timesteps"):
        selected(torch.tensor(timesteps), uniform=True)


def test_unknown_groups_are_named() -> None:
    known = context()
    with known.select(5), pytest.raises(TimestepError, match="'h'.*there are: g"):
        known.index("h")


def test_a_layer_outside_of_every_call_says_so() -> None:
    known = context()
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), known.select(400):
            raise error
        for read in (lambda: known.index("g"), lambda: known.selection):
            with pytest.raises(TimestepError, match="outside the denoiser's forward"):
                read()


def test_a_call_within_a_call_gives_the_selection_back() -> None:
    known = context()
    with known.select(100):
        known.selection.per_call["found"] = 1
        with known.select(900):
            assert known.index("g").tolist() == [2]
            assert known.selection.per_call == {}
        assert known.index("g").tolist() == [0]
        assert known.selection.per_call == {"found": 1}


def test_every_thread_has_its_own_selection() -> None:
    known, found = context(), {}
    meet = threading.Barrier(3)

    def call(t: int) -> None:
        with known.select(t):
            meet.wait()
            found[t] = known.index("g").tolist()
            meet.wait()

    threads = [threading.Thread(target=call, args=(t,)) for t in (100, 400, 900)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {100: [0], 400: [1], 900: [2]}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_no_call_is_running_in_a_copy(copied) -> None:
    known = context(out_of_range="nearest")
    with known.select(100):
        duplicate = copied(known)
        with pytest.raises(TimestepError, match="outside the denoiser's forward"):
            duplicate.index("g")
        with duplicate.select(5000):
            assert duplicate.index("g").tolist() == [2]
        assert known.index("g").tolist() == [0]
