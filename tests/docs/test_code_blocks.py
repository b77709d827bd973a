"""Every Python block of the documentation runs, each document from top to bottom in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from warm_python import WarmPython

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# a page with test directives shows scripts side by side; the tests of its package run it
DOCUMENTS = [page for page in PAGES if "<!-- test:" not in page.read_text()]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


STORIES = BLOCK.findall((ROOT / "README.md").read_text())  # what a reader copies first, one at a time


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_run(document: Path, warm_python: WarmPython, tmp_path: Path) -> None:
    blocks = BLOCK.findall(document.read_text())
    if not blocks:
        pytest.skip(f"{document.name} has no Python blocks")
    script = tmp_path / "document.py"
    script.write_text("\n".join(f"# block {i + 1} of {document.name}\n{block}" for i, block in enumerate(blocks)))
    done = warm_python.run(script)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("story", range(len(STORIES)))
def test_each_block_of_the_readme_runs_alone_and_outside_a_checkout(story: int, tmp_path: Path) -> None:
    (tmp_path / "story.py").write_text(STORIES[story])
    done = subprocess.run([sys.executable, "story.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
