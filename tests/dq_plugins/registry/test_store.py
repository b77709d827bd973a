from __future__ import annotations

import sys
import threading

import pytest

from dq_plugins.errors import MissingDependencyError, RegistryError


def states(registry, kind=None):
    return {(p.name, p.distribution): registry.status(p)[0] for p in registry.plugins(kind)}


def test_code_is_loaded_at_first_use_and_once(one_metric):
    registry = one_metric("import sys\nsys.loaded_flux = getattr(sys, 'loaded_flux', 0) + 1\nflux = object()")
    assert registry.names("metric") == ["flux"]
    assert states(registry) == {("flux", "acme"): "not loaded"}
    assert "acme_flux" not in sys.modules
    first = registry.get("metric", "flux")
    assert registry.get("metric", "flux") is first
    assert sys.loaded_flux == 1
    del sys.loaded_flux
    assert states(registry) == {("flux", "acme"): "ok"}


def test_unknown_name_answers_with_close_matches_and_the_list(one_metric):
    with pytest.raises(RegistryError, match=r"'flix'; did you mean 'flux'\? The names of kind metric: flux\."):
        one_metric().get("metric", "flix")


def test_name_of_another_kind_is_pointed_out(one_metric):
    with pytest.raises(RegistryError, match="There is one of kind metric"):
        one_metric().get("observer", "flux")


def test_unknown_kind_lists_the_kinds(one_metric):
    registry = one_metric()
    for call in (registry.names, registry.plugins, lambda kind: registry.get(kind, "flux")):
        with pytest.raises(RegistryError, match="'metrics' is not a kind of plugin; did you mean 'metric'"):
            call("metrics")


def test_conflict_raises_names_both_distributions_and_the_way_out(workshop, one_metric):
    one_metric()
    workshop.install("zenith", "[dq_plugins.metrics]\nflux = z:f\nother = z:g\n", modules={"z": "f = 1\ng = 2"})
    registry = workshop.registry()
    with pytest.raises(RegistryError) as caught:
        registry.get("metric", "flux")
    assert "'acme' 1.0" in str(caught.value)
    assert "'zenith' 1.0" in str(caught.value)
    assert "-metric:flux@zenith" in str(caught.value)
    assert states(registry) == {
        ("flux", "acme"): "conflict",
        ("flux", "zenith"): "conflict",
        ("other", "zenith"): "not loaded",
    }
    assert registry.get("metric", "other") == 2


def test_denying_one_of_two_rivals_ends_the_conflict(workshop, one_metric):
    one_metric()
    workshop.install("zenith", "[dq_plugins.metrics]\nflux = z:f\n", modules={"z": "f = 'zenith'"})
    workshop.allow("-metric:flux@acme")
    registry = workshop.registry()
    assert registry.get("metric", "flux") == "zenith"
    assert states(registry)[("flux", "acme")] == "denied"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("raise ValueError('half\\nbaked')", "ValueError: half baked"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError"),
        ("other = 1", "AttributeError"),
    ],
)
def test_broken_plugin_is_listed_with_its_exception_and_breaks_no_other(workshop, one_metric, source, why):
    one_metric(source)
    workshop.install("zenith", "[dq_plugins.metrics]\nfine = z:f\n", modules={"z": "f = 1"})
    registry = workshop.registry()
    with pytest.raises(RegistryError, match=r"of distribution 'acme' 1\.0 is broken") as caught:
        registry.get("metric", "flux")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert registry.get("metric", "fine") == 1
    _, broken = registry.plugins("metric")
    state, reason = registry.status(broken)
    assert (broken.name, state) == ("flux", "broken")
    assert why in reason


def test_malformed_entry_point_is_broken(workshop):
    workshop.install("acme", "[dq_plugins.metrics]\nflux = not a target\n")
    with pytest.raises(RegistryError, match=r"written package\.module:attribute"):
        workshop.registry().get("metric", "flux")


def test_broken_plugin_is_tried_again(workshop, one_metric):
    registry = one_metric("raise ImportError('not yet')")
    with pytest.raises(RegistryError):
        registry.get("metric", "flux")
    (workshop.site / "acme_flux.py").write_text("flux = 'mended, and longer than before'")
    assert registry.get("metric", "flux").startswith("mended")
    assert states(registry)[("flux", "acme")] == "ok"


@pytest.mark.parametrize(
    ("more", "state"),
    [
        ("[dq_plugins.api]\nversion = v1\n", "not loaded"),
        ("[dq_plugins.api]\nversion = v2\n", "incompatible"),
        ("[dq_plugins.api]\nversion = v2\nmetric.flux = v1\n", "not loaded"),
        ("[dq_plugins.api]\nversion = v1\nmetric.flux = v7\n", "incompatible"),
        ("[dq_plugins.api]\nversion = one\n", "incompatible"),
    ],
)
def test_api_version_is_checked_before_loading(one_metric, more, state):
    registry = one_metric("raise AssertionError('this must not run')", more=more)
    (plugin,) = registry.plugins()
    assert registry.status(plugin)[0] == state
    if state == "incompatible":
        with pytest.raises(RegistryError, match="v1"):
            registry.get("metric", "flux")
        assert "acme_flux" not in sys.modules


def test_missing_requirement_raises_the_pip_line_before_loading(workshop):
    workshop.install(
        "acme",
        "[dq_plugins.metrics]\nflux = acme_flux:flux [fast]\n",
        metadata="Provides-Extra: fast\nRequires-Dist: no-such-thing>=2; extra == 'fast'\n",
        modules={"acme_flux": "raise AssertionError('this must not run')"},
    )
    with pytest.raises(MissingDependencyError, match=r"no-such-thing>=2 \(not installed\).*'acme\[fast\]'"):
        workshop.registry().get("metric", "flux")
    assert states(workshop.registry()) == {("flux", "acme"): "missing requirement"}


def test_denied_plugin_is_no_name_and_says_which_term_denies_it(workshop, one_metric):
    workshop.allow("-flux")
    registry = one_metric()
    assert registry.names("metric") == []
    assert states(registry) == {("flux", "acme"): "denied"}
    with pytest.raises(RegistryError, match="'-flux'"):
        registry.get("metric", "flux")
    workshop.allow("")
    assert registry.names("metric") == ["flux"]


def test_misspelt_term_is_reported(workshop, one_metric):
    workshop.allow("flux,-flox,*")
    assert one_metric().unmatched_terms() == ["-flox"]


def test_many_threads_get_one_object(one_metric):
    registry = one_metric("import time\ntime.sleep(0.05)\nflux = object()")
    gate, found = threading.Barrier(8), []

    def use():
        gate.wait()
        found.append(registry.get("metric", "flux"))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
