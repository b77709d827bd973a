"""The map in CONTRIBUTING.md names places that exist, and every room of the passes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:dq_plugins|adapters|examples|tests|docs)/[\w/.]+)`", TEXT)))


@pytest.mark.parametrize("place", NAMED)
def test_places_exist(place: str) -> None:
    assert (ROOT / place).exists()


def test_every_room_is_on_the_map() -> None:
    rooms = [f"dq_plugins/passes/{p.parent.name}/" for p in (ROOT / "dq_plugins" / "passes").glob("*/__init__.py")]
    assert set(rooms) <= set(NAMED)
