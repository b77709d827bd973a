"""``dq-plugins list``: every plugin, whose it is, where it is written, and whether it can be used."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Sequence

from dq_plugins import registry
from dq_plugins.errors import RegistryError
from dq_plugins.registry import KINDS, Plugin
from dq_plugins.registry.trial import PATIENCE_S, try_loading
from dq_plugins.report import Table

HELP = "List the plugins: what each does, whose it is, and, with --json, where it is written."
EXAMPLE = """\
dq-plugins list
dq-plugins list --kind observer --load all
dq-plugins list --json | python -c "import json, sys; print([p['name'] for p in json.load(sys.stdin)])"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", choices=KINDS, help="only plugins of this kind")
    parser.add_argument(
        "--load",
        choices=("none", "third-party", "all"),
        default="third-party",
        help="whose code to import, to see whether it is broken",
    )
    parser.add_argument(
        "--seconds", type=float, default=PATIENCE_S, help="how long one plugin of others may take to load"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of records")


def run(args: argparse.Namespace) -> int:
    """Print the list; a plugin that cannot be used is part of the answer, not a failure of the command."""
    if args.load != "none":
        load(registry.plugins(args.kind), built_in=args.load == "all", seconds=args.seconds)
    plugins = registry.plugins(args.kind)
    if args.json:
        print(json.dumps([record(plugin) for plugin in plugins], indent=2))
    else:
        print(table(plugins))
    for term in registry.unmatched_terms():
        print(f"note: the term {term!r} of DQ_PLUGINS matches no plugin", file=sys.stderr)
    return 0


def load(plugins: Sequence[Plugin], *, built_in: bool, seconds: float = PATIENCE_S) -> None:
    """Import what can be imported, so that the registry knows what is broken.

    Args:
        plugins: which.
        built_in: our own plugins too.
        seconds: that a plugin of others may take, in a process of its own.
    """
    waiting = [plugin for plugin in plugins if registry.status(plugin)[0] == "not loaded"]
    try_loading([plugin for plugin in waiting if not plugin.built_in], seconds)
    for plugin in (plugin for plugin in waiting if plugin.built_in and built_in):
        # What a module prints while it is imported must not mix with the list.
        with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(RegistryError):
            plugin.load()


def record(plugin: Plugin) -> dict[str, str | int | None]:
    """A plugin as JSON data."""
    state, reason = registry.status(plugin)
    facts = {name: getattr(plugin, name) for name in ("kind", "name", "distribution", "version", "target")}
    return {**facts, **plugin.location._asdict(), "summary": plugin.summary, "state": state, "reason": reason}


def table(plugins: Sequence[Plugin]) -> str:
    """The list as text: a line per plugin with what it does; below it why it cannot be used, where that is so."""
    foreign = any(not plugin.built_in for plugin in plugins)
    width = max(shutil.get_terminal_size((120, 24)).columns, 80)
    rows = [[p.kind, p.name, *([_origin(p)] if foreign else []), p.summary] for p in plugins]
    heading = ["kind", "name", *(["from"] if foreign else []), "what it does"]
    lines = str(Table(heading, rows)).splitlines()
    head, _, *lines = (line if len(line) <= width else f"{line[: width - 3].rpartition(' ')[0]} ..." for line in lines)
    for number, plugin in enumerate(plugins):
        state, reason = registry.status(plugin)
        if reason:
            lines[number] += f"\n    {state}: {reason}"
    return "\n".join([head, *lines])


def _origin(plugin: Plugin) -> str:
    return "" if plugin.built_in else f"{plugin.distribution or '(this process)'} {plugin.version or ''}".rstrip()
