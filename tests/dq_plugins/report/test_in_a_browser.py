"""The page as a browser lays it out: nothing sticks out at the width of a phone or of a desk, and no script fails."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dq_plugins.plots import lines
from dq_plugins.report import Page, Table
from dq_plugins.report.pictures import Picture

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# the page tells its own width in its title, which is part of what --dump-dom prints
TELL = '<script>document.title = document.documentElement.scrollWidth + " of " + window.innerWidth;</script>'


def long_page() -> Page:
    page = Page("A page with everything that can be wide")
    page.facts({"versions": "torch 2.13.0, torchao 0.18.0, diffusers 0.42.1", "recipe": "default"})
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    page.table(Table(["layer", *"abcdefgh"], [[name, *range(8)]]))
    page.table(Table(["layer", "n"], [["b", 10], ["a", 9]]), folded="every layer")
    page.figure(lines({"ours": ([1, 2], [3.0, 4.0])}, "t", "dB"), "a figure")
    page.pictures({f"picture {i}": [Picture(np.eye(4), "fp32")] for i in range(9)}, "nine pictures")
    return page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [500, 1280])  # headless windows of Chromium are not narrower than 500
def test_page_fits_its_window_and_logs_no_error(tmp_path: Path, width: int) -> None:
    file = tmp_path / "page.html"
    file.write_text(long_page().html().replace("</body>", f"{TELL}</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},900", "--enable-logging=stderr", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert found is not None, done.stderr[-1000:]
    assert int(found[1]) <= int(found[2]) <= width
    assert "CONSOLE" not in done.stderr
