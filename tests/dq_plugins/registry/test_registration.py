"""What code of this process registers, through the public functions."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from dq_plugins.errors import MissingDependencyError, RegistryError


@pytest.fixture
def registry(workshop):
    """The registry with nothing installed."""
    return workshop.registry()


def at_top_level(reference, output):
    return 0.0


def test_registered_object_is_found_where_it_is_written(registry):
    assert registry.register("metric", "flux")(at_top_level) is at_top_level
    assert registry.get("metric", "flux") is at_top_level
    (plugin,) = registry.plugins()
    assert registry.status(plugin)[0] == "ok"
    assert plugin.location.file == __file__
    assert Path(__file__).read_text().splitlines()[plugin.location.line - 1].startswith("def at_top_level")


def test_instance_belongs_to_the_module_that_registers_it(registry):
    registry.register("recipe", "mine")(object())
    (plugin,) = registry.plugins()
    assert plugin.target == f"{__name__}:object"


def test_second_owner_of_a_name_needs_override(registry):
    registry.register("metric", "flux")(len)
    with pytest.raises(RegistryError, match=r"registered twice.*override=True"):
        registry.register("metric", "flux")(print)
    assert registry.get("metric", "flux") is len
    registry.register("metric", "flux", override=True)(print)
    assert registry.get("metric", "flux") is print


def test_same_definition_may_run_twice_as_in_a_notebook(registry):
    def cell():
        @registry.register("metric", "flux")
        def flux(reference, output):
            return 0.0

        return flux

    cell()
    second = cell()
    assert registry.get("metric", "flux") is second


def test_requirements_are_checked_at_get(registry):
    registry.register("metric", "needy", requires=("no-such-thing>=2",))(len)
    with pytest.raises(MissingDependencyError, match="pip install 'no-such-thing>=2'"):
        registry.get("metric", "needy")


def test_installed_plugin_is_replaced_only_by_override(workshop):
    workshop.install("acme", "[dq_plugins.metrics]\nflux = acme_flux:flux\n", modules={"acme_flux": "flux = 1"})
    registry = workshop.registry()
    with pytest.raises(RegistryError, match=r"'acme' 1\.0"):
        registry.register("metric", "flux")(len)
    registry.register("metric", "flux", override=True)(len)
    assert registry.get("metric", "flux") is len


def test_module_may_register_what_its_entry_point_names(workshop):
    source = "from dq_plugins import registry as r\n@r.register('metric', 'flux')\ndef flux(a, b): return 0.0\n"
    workshop.install("acme", "[dq_plugins.metrics]\nflux = acme_flux:flux\n", modules={"acme_flux": source})
    registry = workshop.registry()
    loaded = registry.get("metric", "flux")
    assert loaded is importlib.import_module("acme_flux").flux
    (plugin,) = registry.plugins()
    assert (plugin.distribution, plugin.version, registry.status(plugin)[0]) == ("acme", "1.0", "ok")


def test_temporary_takes_the_place_and_gives_it_back_even_after_an_error(registry):
    registry.register("metric", "flux")(len)
    stand_in = object()
    with pytest.raises(ZeroDivisionError), registry.temporary("metric", "flux", stand_in) as given:  # noqa: PT012
        assert given is stand_in
        assert registry.get("metric", "flux") is stand_in
        raise ZeroDivisionError
    assert registry.get("metric", "flux") is len


def test_temporary_name_is_gone_afterwards(registry):
    with registry.temporary("observer", "fleeting", object()):
        assert registry.names("observer") == ["fleeting"]
    assert registry.names("observer") == []
    assert registry.plugins() == []


def test_public_functions_share_one_registry_with_the_package():
    import dq_plugins
    from dq_plugins import registry

    with registry.temporary("metric", "flux", len):
        assert "flux" in dq_plugins.names("metric")
        assert dq_plugins.get("metric", "flux") is len
    assert "dq_plugins.registry" in sys.modules
