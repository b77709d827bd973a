from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def _no_trace_records(monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest's log capture makes torch format its structured trace, ten times the cost of an export
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
