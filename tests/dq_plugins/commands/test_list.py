from __future__ import annotations

import json

import pytest

from dq_plugins.cli import main
from dq_plugins.registry import Plugin, store


@pytest.fixture(autouse=True)
def _four_plugins(monkeypatch):
    installed = [
        Plugin("metric", "ours", "json:dumps", "dq-plugins", "1.0"),
        Plugin("metric", "fine", "json:loads", "acme", "2.0"),
        Plugin("observer", "broken", "no_such_module_anywhere:x", "acme", "2.0"),
        Plugin("observer", "future", "json:loads", "acme", "2.0", api="v9"),
    ]
    monkeypatch.setattr(store, "_plugins", store.by_name(installed))


def listed(capsys, *arguments):
    assert main(["list", "--json", *arguments]) == 0
    return {record["name"]: record for record in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize(
    ("load", "ours", "fine", "broken"),
    [
        ("none", "not loaded", "not loaded", "not loaded"),
        ("third-party", "not loaded", "ok", "broken"),
        ("all", "ok", "ok", "broken"),
    ],
)
def test_load_decides_whose_code_runs(capsys, load, ours, fine, broken):
    found = listed(capsys, "--load", load)
    assert {name: record["state"] for name, record in found.items()} == {
        "ours": ours,
        "fine": fine,
        "broken": broken,
        "future": "incompatible",
    }


def test_json_record_tells_whose_where_and_why(capsys):
    found = listed(capsys)
    fine = found["fine"]
    assert (fine["kind"], fine["distribution"], fine["version"]) == ("metric", "acme", "2.0")
    assert fine["file"].endswith("json/__init__.py")
    with open(fine["file"]) as source:
        assert source.readlines()[fine["line"] - 1].startswith("def loads(")
    assert fine["reason"] == ""
    assert "No module named 'no_such_module_anywhere'" in found["broken"]["reason"]
    assert found["broken"]["file"] is None


def test_table_has_a_line_per_plugin_and_the_reason_below_it(capsys):
    assert main(["list"]) == 0
    header, broken, why, future, reason, fine, ours = capsys.readouterr().out.splitlines()
    assert header.split() == ["kind", "name", "from", "what", "it", "does"]
    assert ours.split()[:3] == ["metric", "ours", "Serialize"]  # nothing but a plugin that cannot be used has a state
    assert fine.split()[:5] == ["metric", "fine", "acme", "2.0", "Deserialize"]
    assert broken.split() == ["observer", "broken", "acme", "2.0"]
    assert why.strip().startswith("broken: loading no_such_module_anywhere:x raised ModuleNotFoundError")
    assert future.split()[:2] == ["observer", "future"]
    assert reason.strip().startswith("incompatible: ")


def test_kind_limits_the_list(capsys):
    assert set(listed(capsys, "--kind", "metric")) == {"ours", "fine"}


def test_denied_plugin_is_listed_and_a_misspelt_term_is_noted(capsys, monkeypatch):
    monkeypatch.setenv("DQ_PLUGINS", "-fine,-fnie")
    assert main(["list", "--json"]) == 0
    captured = capsys.readouterr()
    states = {record["name"]: record["state"] for record in json.loads(captured.out)}
    assert states["fine"] == "denied"
    assert "'-fnie' of DQ_PLUGINS matches no plugin" in captured.err
    assert "'-fine'" not in captured.err


def test_malformed_variable_is_one_line_on_stderr_and_exit_status_2(capsys, monkeypatch):
    monkeypatch.setenv("DQ_PLUGINS", "metrics:fine")
    assert main(["list"]) == 2
    assert capsys.readouterr().err.startswith("dq-plugins list: the environment variable DQ_PLUGINS")
