"""The long description of a release: README.md, whose links and images are relative to the repository, for PyPI."""

from __future__ import annotations

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)")


class LongDescription(MetadataHookInterface):
    """Called by hatchling for every wheel, archive and editable installation."""

    def update(self, metadata: dict) -> None:
        """Set the field ``readme``."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = absolute(text, metadata["urls"]["Homepage"], f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute(text: str, repository: str, tag: str) -> str:
    """Markdown whose relative links lead to files of a repository on GitHub, as they were at ``tag``.

    Example:
        >>> absolute("[a](docs/a.md), ![b](b.png)", "https://github.com/x/y", "v1")
        '[a](https://github.com/x/y/blob/v1/docs/a.md), ![b](https://github.com/x/y/raw/v1/b.png)'
    """
    return LINK.sub(lambda m: f"{m[1]}[{m[2]}]({repository}/{'raw' if m[1] else 'blob'}/{tag}/{m[3]})", text)
