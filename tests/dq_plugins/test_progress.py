import pytest

from dq_plugins.progress import Progress, finish, reported


def counting(fail: bool = False):
    yield 1
    if fail:
        raise KeyError("half way")
    yield 2
    return "counted"


def whole(fail: bool = False, quiet: tuple[int, ...] = ()):
    result = yield from reported(counting(fail), lambda n: None if n in quiet else Progress(10 + n, 12, "counting"))
    return result.upper()


def test_steps_of_a_part_are_progress_of_the_whole_and_its_result_comes_back():
    assert list(whole()) == [Progress(11, 12, "counting"), Progress(12, 12, "counting")]
    assert finish(whole()) == "COUNTED"


def test_steps_not_worth_showing_are_not():
    assert list(whole(quiet=(1,))) == [Progress(12, 12, "counting")]


def test_errors_of_the_part_reach_the_whole():
    with pytest.raises(KeyError, match="half way"):
        finish(whole(fail=True))
