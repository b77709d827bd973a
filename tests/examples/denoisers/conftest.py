from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).parents[3] / "examples" / "denoisers"
sys.path.insert(0, str(FOLDER))  # the scripts import each other as they do when they are run
