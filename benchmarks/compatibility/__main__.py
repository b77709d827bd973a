"""Make environments of other interpreters and releases, and run everything once in each.

    python -m benchmarks.compatibility [NAME ...] [--folder FOLDER] [--again]

Each needs 5 GB of disk for minutes and is removed afterwards; PyTorch comes from PyPI with its CUDA packages. Results
go to ``benchmarks/results/compatibility.json`` one by one, and the table in ``docs/compatibility.md`` is written from
them. The exit status is the number of environments in which something fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.compatibility import smoke
from benchmarks.compatibility.environments import ROOT, Environment, environments, install, interpreter
from benchmarks.compatibility.table import write_page
from benchmarks.records import RESULTS
from dq_plugins.atomic import write_atomically

RECORD = RESULTS / "compatibility.json"


def attempt(environment: Environment, wheel: Path, folder: Path) -> dict[str, Any]:
    """Versions and stages of one environment; ``"failed"`` says why there are none."""
    python = interpreter(environment.python)
    if python is None:
        return {"failed": f"no Python {environment.python} on this machine"}
    shutil.rmtree(folder, ignore_errors=True)
    try:
        own = install(environment, python, wheel, folder / "environment")
        (folder / "run").mkdir()
        command = [own, smoke.__file__, folder / "run"]
        settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        settings.pop("PYTHONPATH", None)
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=settings)
    except subprocess.CalledProcessError as error:
        lines = str(error.stderr).strip().splitlines() or [str(error)]
        return {"failed": next((line for line in lines if line.startswith("ERROR")), lines[-1])}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    (folder.parent / f"{environment.name}.log").write_text(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def build(folder: Path) -> Path:
    """The wheel of this checkout."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    return next(folder.glob("dq_plugins-*.whl"))


def main(arguments: list[str]) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="these environments only")
    parser.add_argument("--folder", type=Path, help="where environments are made; the temporary folder by default")
    parser.add_argument("--again", action="store_true", help="try what is on record, too")
    args = parser.parse_args(arguments)
    data = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    known = [each.name for each in environments()]
    data = {name: data[name] for name in known if name in data}
    with tempfile.TemporaryDirectory(prefix="dq-compatibility-", dir=args.folder) as place:
        folder = Path(place)
        wheel = build(folder / "wheel")
        for environment in environments():
            name = environment.name
            if (args.names and name not in args.names) or (name in data and not args.again):
                continue
            data[name] = attempt(environment, wheel, folder / "one")
            print(f"{name}: {data[name]}", flush=True)
            ordered = {each: data[each] for each in known if each in data}
            write_atomically(RECORD, (json.dumps(ordered, indent=1) + "\n").encode())
            write_page(ordered)
    return sum("failed" in found or set(found["stages"].values()) != {"ok"} for found in data.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
