"""The messages that docs/faq.md explains are messages of the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"^\| `([^|]+)` \|", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE)


def texts() -> str:
    """Every string of the code, an unknown part of a formatted one as ``...``."""
    found = []
    for folder in ("dq_plugins", "adapters"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


@pytest.mark.parametrize("message", ROWS)
def test_message_is_said_somewhere(message: str) -> None:
    every = texts()
    for part in filter(None, map(str.strip, message.split("..."))):
        assert part in every, part
