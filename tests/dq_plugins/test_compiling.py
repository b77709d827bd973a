from __future__ import annotations

import threading
import time

import pytest
import torch

from dq_plugins import compiling as module
from dq_plugins.compiling import compiling


def test_time_and_graphs_are_shown_while_a_compiler_works(capsys, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.01)

    def works(graph, inputs):
        time.sleep(0.05)
        return graph

    compiled = torch.compile(torch.nn.Linear(2, 2), backend=works)
    with compiling("compiling a layer", progress=True):
        compiled(torch.zeros(1, 2))
        time.sleep(0.05)
    shown = capsys.readouterr().err
    assert "compiling a layer: 00:00, 0 graphs compiled" in shown
    assert "compiling a layer: 00:00, 1 graph compiled" in shown
    assert "compiling" not in {thread.name for thread in threading.enumerate()}


def test_nothing_is_shown_in_a_file_and_an_error_passes(capsys):
    with pytest.raises(ZeroDivisionError), compiling():
        1 / 0  # noqa: B018
    assert capsys.readouterr().err == ""
