import time

import pytest

from dq_plugins import stages
from dq_plugins.demo import expected_seconds
from dq_plugins.stages import Stages


class Clock:
    """Stands still until it is put on."""

    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def told() -> list[str]:
    return []


def test_the_estimate_scales_with_what_the_finished_stages_took(told: list[str]) -> None:
    clock = Clock()
    announce = Stages({"sample": 10, "plan": 30, "draw": 20}, told.append, clock)
    announce("sample", "sampling")
    clock.seconds += 20  # twice as long as expected
    announce("plan", "making a plan")
    clock.seconds += 30
    announce("draw", "drawing")
    assert told == [
        "[   0 s] 1/3 sampling; about 60 s to the end",
        "[  20 s] 2/3 making a plan; about 100 s to the end".replace("100 s", "2 min"),
        "[  50 s] 3/3 drawing; about 25 s to the end",
    ]


def test_a_stage_that_takes_longer_than_expected_promises_nothing(told: list[str]) -> None:
    clock = Clock()
    announce = Stages({"sample": 10, "plan": 30}, told.append, clock)
    announce("sample", "sampling")
    assert announce.remaining(4.0) == 36
    assert announce.remaining(25.0) is None


def test_what_is_not_known_is_not_estimated(told: list[str]) -> None:
    Stages({}, told.append, Clock())("plan", "making a plan")
    assert told == ["[   0 s] making a plan"]
    assert expected_seconds("digits", "best", compiled=True) == {}


def test_a_long_stage_says_that_it_goes_on(told: list[str], monkeypatch) -> None:
    monkeypatch.setattr(stages, "SILENCE", 0.02)
    announce = Stages({"plan": 30}, told.append)
    with announce.heard():
        announce("plan", "making a plan")
        time.sleep(0.1)
    assert len(told) >= 2
    assert "1/1 still making a plan" in told[-1]
    count = len(told)
    time.sleep(0.05)
    assert len(told) == count


def test_the_demo_announces_the_stages_that_are_estimated() -> None:
    from inspect import getsource

    from dq_plugins.demo import run_demo

    said = [line.split('"')[1] for line in getsource(run_demo).splitlines() if line.strip().startswith("say(")]
    assert said == list(expected_seconds("emoji", "default", compiled=True))
