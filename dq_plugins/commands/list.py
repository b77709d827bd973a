"""``dq-plugins list``: every plugin, whose it is, where it is written, and whether it can be used."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence

from dq_plugins import registry
from dq_plugins.errors import RegistryError
from dq_plugins.registry import KINDS, Plugin

HELP = "List the plugins: whose they are, where they are written, and whether they can be used."
EXAMPLE = """\
dq-plugins list
dq-plugins list --kind observer --load all
dq-plugins list --json | python -c "import json, sys; print([p['name'] for p in json.load(sys.stdin)])"
"""
COLUMNS = ("kind", "name", "state", "distribution", "written in")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``dq-plugins list``."""
    parser.add_argument("--kind", choices=KINDS, help="only plugins of this kind")
    parser.add_argument(
        "--load",
        choices=("none", "third-party", "all"),
        default="third-party",
        help="whose code to import, to see whether it is broken (default: third-party); "
        "what is not imported is listed as 'not loaded'",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of records")


def run(args: argparse.Namespace) -> int:
    """Print the list; a plugin that cannot be used is part of the answer, not a failure of the command."""
    if args.load != "none":
        load_plugins(registry.plugins(args.kind), built_in=args.load == "all")
    found = registry.plugins(args.kind)
    if args.json:
        print(json.dumps([plugin.as_dict() for plugin in found], indent=2))
    else:
        print(table(found))
    for term in registry.unmatched_terms():
        print(f"note: the term {term!r} of DQ_PLUGINS matches no plugin", file=sys.stderr)
    return 0


def load_plugins(plugins: Sequence[Plugin], *, built_in: bool) -> None:
    """Import what can be imported, so that the registry knows what is broken.

    Args:
        plugins: records of the registry.
        built_in: whether to import the plugins of dq-plugins itself, too.
    """
    for plugin in plugins:
        if plugin.state == "not loaded" and (built_in or not plugin.declaration.built_in):
            # What a module prints while it is imported must not mix with the list.
            with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(RegistryError):
                registry.load(plugin)


def table(plugins: Sequence[Plugin]) -> str:
    """The list as text: a line per plugin, and below it why it cannot be used."""
    rows = [COLUMNS, *(_row(plugin) for plugin in plugins)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row, plugin in zip(rows, [None, *plugins], strict=True):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
        if plugin is not None and plugin.reason:
            lines.append(f"    {plugin.state}: {plugin.reason}")
    return "\n".join(lines)


def _row(plugin: Plugin) -> tuple[str, ...]:
    distribution = f"{plugin.distribution} {plugin.version}" if plugin.distribution else "(this process)"
    return plugin.kind, plugin.name, plugin.state, distribution, str(plugin.location)
