"""A small share of what ``make fuzz`` does, drawn by Hypothesis: every kind of file, changed and signed again."""

from __future__ import annotations

from contextlib import suppress
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import Reader, readers

from dq_plugins.artifact.strict_json import parse_json
from dq_plugins.errors import DQError

KINDS = (
    "recording", "plan", "plan with everything", "torchao", "brevitas", "config of diffusers", "plan in a config",
    "statistics", "measurement", "block", "sweep", "group search", "evolution", "training", "interrupted run",
)  # fmt: skip
FEW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Reader]:
    return readers(tmp_path_factory.mktemp("whole"))


def test_there_is_a_reader_of_every_kind(found):
    assert tuple(found) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_file_is_refused_in_our_words_or_read(found, kind):
    refused = 0

    @FEW
    @given(seed=st.integers(0, 2**32))
    def attempt(seed: int) -> None:
        nonlocal refused
        found[kind].change(Random(seed))
        try:
            found[kind].read()
        except DQError:
            refused += 1

    attempt()
    assert refused or kind == "interrupted run"  # which makes again what it cannot read


# a library loaded before may have set the processor to treat subnormal numbers as 0
numbers = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=50, deadline=None)
@given(data=st.binary() | json_values.map(lambda value: repr(value).encode("utf-8", "replace")))
def test_any_bytes_are_json_or_a_value_error(data):
    with suppress(ValueError):
        parse_json(data)
