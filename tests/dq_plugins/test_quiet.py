import logging

import pytest

from dq_plugins.quiet import loggers_at


def test_levels_hold_inside_and_come_back_even_after_an_error():
    chatty, quiet = (logging.getLogger(f"test-quiet.{name}") for name in ("chatty", "quiet"))
    chatty.setLevel(logging.DEBUG)

    def fail() -> None:
        with loggers_at(logging.ERROR, (chatty.name, quiet.name)):
            assert not chatty.isEnabledFor(logging.WARNING)
            assert quiet.isEnabledFor(logging.ERROR)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (chatty.level, quiet.level) == (logging.DEBUG, logging.NOTSET)
