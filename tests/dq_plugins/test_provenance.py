from __future__ import annotations

import sys

from dq_plugins import registry
from dq_plugins.provenance import library_code, plugin_code, source_hash
from dq_plugins.registry import Plugin
from dq_plugins.version import __version__


class One:
    """A plugin of this process."""

    value = 1


class Two:
    """Another."""

    value = 2


def test_the_hash_follows_every_file_of_a_package(tmp_path, monkeypatch) -> None:
    package = tmp_path / "acme_dq"
    (package / "below").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "below" / "deep.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    first = source_hash("acme_dq")
    assert source_hash("acme_dq") == first
    (package / "below" / "deep.py").write_text("x = 2\n")
    assert source_hash("acme_dq") != first
    assert "acme_dq" not in sys.modules


def test_a_single_module_counts_too_and_an_absent_one_does_not(tmp_path, monkeypatch) -> None:
    (tmp_path / "acme_single.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert source_hash("acme_single") != source_hash("acme_absent")


def test_releases_are_named() -> None:
    code = library_code()
    assert code["dq-plugins"].startswith(f"{__version__} (")
    assert code["torch"]


def test_the_code_of_a_plugin_is_that_of_its_distribution_or_its_own() -> None:
    assert plugin_code(registry.find("pass", "weight-ranges")) == ""

    first, second = (plugin_code(Plugin.of("pass", "mine", each, __name__)) for each in (One, Two))
    assert first.startswith("this process (")
    assert second != first
    installed = Plugin("pass", "theirs", "packaging.version:Version", "acme", "2.1")
    assert plugin_code(installed) == f"acme 2.1 ({source_hash('packaging')})"
