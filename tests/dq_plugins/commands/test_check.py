from __future__ import annotations

import json

import pytest

from dq_plugins import registry
from dq_plugins.cli import main
from dq_plugins.errors import DQError
from dq_plugins.registry import store


def distance(reference, output):
    """Mean absolute difference."""
    if reference.shape != output.shape or output.isnan().any():
        raise DQError("bad input")
    return float((reference - output).abs().mean())


distance.higher_is_better = False


@pytest.fixture(autouse=True)
def _metric():
    with registry.temporary("metric", "distance", distance):
        yield


def test_sound_plugin_passes_with_status_0(capsys):
    assert main(["check", "distance"]) == 0
    head, *lines, total = capsys.readouterr().out.splitlines()
    assert head.startswith("metric 'distance' of module ")
    assert __file__ in head
    assert all(line.split()[0] == "passed" for line in lines)
    assert total == f"{len(lines)} checks hold, 0 do not, 0 skipped"


def test_fault_is_shown_with_its_reason_and_status_1(capsys, monkeypatch):
    monkeypatch.setattr(distance, "higher_is_better", True)
    assert main(["check", "distance"]) == 1
    out = capsys.readouterr().out
    assert "failed  more noise is worse" in out
    assert "'distance' says higher is better and gave [" in out


def test_json_holds_every_result(capsys, monkeypatch):
    monkeypatch.setattr(distance, "higher_is_better", None)
    assert main(["check", "distance", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["name"], report["ok"]) == ("metric", "distance", False)
    failed = {result["test"] for result in report["results"] if result["outcome"] == "failed"}
    assert "it says which direction is better" in failed
    assert len(report["results"]) > len(failed)


def test_unknown_name_is_status_2_with_close_matches(capsys):
    assert main(["check", "distanse"]) == 2
    assert "there is no plugin named 'distanse'; did you mean 'distance'?" in capsys.readouterr().err


def test_name_of_two_kinds_needs_the_kind(capsys):
    with registry.temporary("solver", "distance", distance):
        assert main(["check", "distance"]) == 2
        assert "of the kinds metric and solver; choose by --kind" in capsys.readouterr().err
        assert main(["check", "distance", "--kind", "metric"]) == 0


def test_broken_plugin_is_one_error_and_status_2(capsys, monkeypatch):
    broken = registry.Plugin("metric", "broken", "no_such_module:x", "acme", "1.0")
    monkeypatch.setitem(store._plugins, ("metric", "broken"), [broken])
    assert main(["check", "broken"]) == 2
    captured = capsys.readouterr()
    assert "of distribution 'acme' 1.0 is broken" in captured.err
    assert captured.out == ""
