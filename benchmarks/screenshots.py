"""Pictures of the demo's report and of the documentation site, as Chromium shows them, for docs/images.

python -m benchmarks.screenshots                                    makes a report first (a minute or two)
python -m benchmarks.screenshots --report demo-report/.../report.html
"""

from __future__ import annotations

import argparse
import html
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
SIZES = {390: 844, 1280: 800}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def screenshot(page: str, file: Path, width: int, *, dark: bool, height: int | None = None) -> None:
    """Save what a window of this width (in pixels) shows of ``page``, in few colours.

    Windows of headless Chromium are not narrower than 500 pixels, so the page stands in a frame of its width.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed")
    height = height or SIZES[width]
    with tempfile.TemporaryDirectory() as folder:
        frame, shot = Path(folder) / "frame.html", Path(folder) / "shot.png"
        style = f"position:absolute;left:0;top:0;border:0;width:{width}px;height:{height}px"
        frame.write_text(f'<iframe src="{html.escape(page)}" style="{style}" scrolling="no"></iframe>')
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
        command += ["--hide-scrollbars", "--allow-file-access-from-files", "--virtual-time-budget=4000"]
        command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        command += [f"--window-size={max(width, 500)},{height + 200}", f"--screenshot={shot}", frame.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        picture = Image.open(shot).convert("RGB").crop((0, 0, width, height))
    picture.quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)


def made_report(folder: Path) -> Path:
    """The report of a demo that is made for it."""
    command = [sys.executable, "-m", "dq_plugins.cli", "demo", "--no-compile", "--out", str(folder)]
    subprocess.run(command, check=True)
    return next(folder.glob("*/report.html"))


def made_site(folder: Path) -> Path:
    """First page of the site."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    return folder / "index.html"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="report.html of a demo; by default one is made")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pages = {"site": made_site(Path(folder) / "site"), "report": args.report or made_report(Path(folder) / "demo")}
        for name, page in pages.items():
            for width in SIZES:
                for dark in (False, True):
                    file = args.out / f"{name}-{width}-{'dark' if dark else 'light'}.png"
                    screenshot(page.resolve().as_uri(), file, width, dark=dark)
                    print(f"{file}: {file.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
