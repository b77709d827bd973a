"""``dq-plugins check``: run the conformance suite of a plugin's kind on it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from dq_plugins import registry
from dq_plugins.errors import RegistryError, close_matches
from dq_plugins.registry import KINDS

if TYPE_CHECKING:
    from dq_plugins.testing.running import Result

HELP = "Check that a plugin keeps the protocol of its kind. Exit status 0 when it does, 1 when it does not."
EXAMPLE = """\
dq-plugins check minmax
dq-plugins check simulate --kind adapter --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="registered name of the plugin")
    parser.add_argument("--kind", choices=KINDS, help="its kind, where several kinds have that name")
    parser.add_argument("--json", action="store_true", help="print a JSON object of the results")


def run(args: argparse.Namespace) -> int:
    kind = args.kind or kind_of(args.name)
    plugin = registry.find(kind, args.name)
    plugin.load()  # a broken plugin is one clear error, not a failure of every test
    from dq_plugins.testing import run_suite, suite_for

    if not args.json:
        print(f"{kind} {args.name!r} of {plugin.origin}, {plugin.location}")
    results = []
    for result in run_suite(suite_for(kind, args.name)):
        results.append(result)
        if not args.json:
            print(_line(result), flush=True)
    bad = sum(result.outcome in ("failed", "error") for result in results)
    skipped = sum(result.outcome == "skipped" for result in results)
    if args.json:
        report = {"kind": kind, "name": args.name, "ok": not bad, "results": [asdict(each) for each in results]}
        print(json.dumps(report, indent=1))
    else:
        print(f"{len(results) - bad - skipped} checks hold, {bad} do not, {skipped} skipped")
    return 1 if bad else 0


def kind_of(name: str) -> str:
    """The kind of the plugins of this name.

    Raises:
        RegistryError: no kind, or more than one, has it.
    """
    names = {kind: registry.names(kind) for kind in KINDS}
    kinds = [kind for kind in KINDS if name in names[kind]]
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        raise RegistryError(f"there are plugins named {name!r} of the kinds {' and '.join(kinds)}; choose by --kind.")
    every = sorted({each for kind in KINDS for each in names[kind]})
    hint = close_matches(name, every) or "."
    raise RegistryError(f"there is no plugin named {name!r}{hint} `dq-plugins list` shows what there is.")


def _line(result: Result) -> str:
    line = f"  {result.outcome:8}{result.test}  ({result.seconds:.2f} s)"
    return f"{line}\n          {result.message}" if result.message else line
