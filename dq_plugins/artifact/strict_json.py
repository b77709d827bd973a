"""JSON from a file that anyone may have written."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

MOST_DEPTH = 64
"""Containers inside of one another; what is written here has about ten."""


def parse_json(data: bytes) -> Any:
    """Parse JSON that says everything once.

    Raises:
        ValueError: not JSON in UTF-8, a key stands twice in an object, a number is not finite, or containers lie in
            each other too deeply.
    """
    try:
        found = json.loads(
            data.decode(), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite
        )  # fmt: skip
    except RecursionError:
        raise ValueError("its lists and objects are nested too deeply") from None
    _check_depth(found)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(MOST_DEPTH):
        level = [
            part
            for each in level
            if isinstance(each, dict | list)
            for part in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise ValueError(f"its lists and objects are nested more than {MOST_DEPTH} deep")
