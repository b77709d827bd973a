"""Plugins that fail, block, exit or are rubbish, and those that take the name of a built-in one."""

from __future__ import annotations

import time

import pytest

import dq_plugins as dq
from dq_plugins.errors import RegistryError
from dq_plugins.recipe import Recipe, Step
from dq_plugins.registry import Plugin, store
from dq_plugins.registry.trial import try_loading
from dq_plugins.testing.denoiser import calibrated


def test_every_way_to_fail_is_named_and_the_others_load(workshop, tmp_path, capfd) -> None:
    sources = {
        "raises": "raise ValueError('half baked')",
        "exits": "import os; os._exit(7)",
        "says": "print('{}'); x = 1",
        "blocks": "import time\nwhile True: time.sleep(0.01)",
        "interrupts": "raise KeyboardInterrupt",
        "fine": "x = 1",
    }
    for name, source in sources.items():
        (tmp_path / f"acme_{name}.py").write_text(source)
    plugins = [Plugin("metric", name, f"acme_{name}:x", "acme", "1.0") for name in sources]
    began = time.monotonic()
    try_loading(plugins, seconds=8.0)
    assert time.monotonic() - began < 60
    found = {plugin.name: plugin.failure or plugin.loads for plugin in plugins}
    assert found == {
        "raises": "loading acme_raises:x raised ValueError: half baked",
        "exits": "loading acme_exits:x ended the process, with status 7",
        "says": True,
        "blocks": "loading acme_blocks:x did not end within 8 s",
        "interrupts": "loading acme_interrupts:x raised KeyboardInterrupt",
        "fine": True,
    }
    assert capfd.readouterr().out == ""


def test_a_built_in_plugin_keeps_its_name_and_the_other_can_be_chosen(monkeypatch) -> None:
    ours = Plugin("metric", "mse", "json:dumps", "dq-plugins", "1.0")
    theirs = Plugin("metric", "mse", "json:loads", "acme", "2.0")
    for both in ([ours, theirs], [theirs, ours]):
        monkeypatch.setattr(store, "_plugins", store.by_name(both))
        assert store.get("metric", "mse").__name__ == "dumps"
        assert store.status(ours)[0] == "ok"
        state, why = store.status(theirs)
        assert state == "conflict"
        assert "DQ_PLUGINS='-metric:mse@dq-plugins'" in why
    monkeypatch.setenv("DQ_PLUGINS", "-metric:mse@dq-plugins")
    assert store.get("metric", "mse").__name__ == "loads"


def test_a_location_that_cannot_be_found_is_none(monkeypatch) -> None:
    def broken(*_):
        raise RuntimeError("an import hook of somebody else")

    monkeypatch.setattr("importlib.util.find_spec", broken)
    for target in ("acme_not_loaded:x", "", ":", "no colon", "a..b:c"):
        assert str(Plugin("metric", "m", target, "acme", "1.0").location) == "-"


@pytest.mark.parametrize("rubbish", [None, 3, "text", object, lambda: None])
def test_rubbish_in_the_place_of_a_plugin_is_said(rubbish) -> None:
    recipe = Recipe("r", "", (Step("mine"),))
    with calibrated() as (denoiser, calibration), store.temporary("pass", "mine", rubbish):
        with pytest.raises(RegistryError, match="registers as pass 'mine' is no subclass of dq_plugins.Pass"):
            dq.make_plan(denoiser, calibration, recipe, progress=False)
        with store.temporary("recipe", "mine", rubbish), pytest.raises(RegistryError, match="'mine' is no Recipe"):
            dq.make_plan(denoiser, calibration, "mine", progress=False)
    with store.temporary("metric", "mine", 3), pytest.raises(RegistryError, match="which cannot be called"):
        store.function("metric", "mine")
