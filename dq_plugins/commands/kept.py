"""What an interrupted command has left on disk, for its last words."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

RESUMING = ("record", "plan", "quantize")
"""Commands that go on where they were."""


def last_words(args: argparse.Namespace) -> str:
    """What is kept after an interruption, and how to go on."""
    if args.command not in RESUMING:
        return "nothing is kept; run the same command again"
    found = list(_kept(Path(args.out)))
    if not found:
        return "nothing was finished yet; run the same command again"
    return f"kept: {'; '.join(found)}. The same command goes on from there"


def _kept(out: Path) -> Iterator[str]:
    from dq_plugins.calibration.storage import MANIFEST_NAME, read_manifest
    from dq_plugins.errors import DQError
    from dq_plugins.plan.quant_plan import PLAN_NAME
    from dq_plugins.recipe.results import WORK_NAME
    from dq_plugins.recipe.run_settings import RUN, RUN_NAME

    for path in sorted([*out.glob(MANIFEST_NAME), *out.glob(f"*/{MANIFEST_NAME}"), *out.glob(f"*/*/{MANIFEST_NAME}")]):
        try:
            manifest = read_manifest(path.parent)
        except DQError:
            continue
        yield f"{len(manifest.calls)} recorded calls in {path.parent}"
    for depth in ("", "*/", "*/*/"):
        for path in sorted(out.glob(f"{depth}{WORK_NAME}/{RUN_NAME}")):
            try:
                total = len(RUN.read(path).passes)
            except DQError:
                continue
            done = len(list(path.parent.glob(f"[0-9][0-9]-*/{PLAN_NAME}")))
            yield f"{done} of {total} passes, and the finished parts of the next, in {path.parent}"
