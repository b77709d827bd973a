"""The figures of ``dq-plugins demo``, kept as a record.

python -m benchmarks.demo --model emoji [--no-compile]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.records import Records
from dq_plugins.bundled_denoisers import NAMES
from dq_plugins.demo import run_demo
from dq_plugins.report.demo_page import summary_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji", choices=NAMES)
    parser.add_argument("--no-compile", action="store_true", help="skip the compiled denoisers: most of the time")
    args = parser.parse_args()
    records = Records(f"demo-{args.model}", vars(args))
    with tempfile.TemporaryDirectory() as folder:
        table = summary_table(run_demo(Path(folder), args.model, compiled=not args.no_compile))
    records.put("rows", table.rows)
    print(table)


if __name__ == "__main__":
    main()
