"""Take every denoiser of diffusers, and some of other codes, through all stages, as tiny random builds.

    python -m benchmarks.zoo [NAME ...] [--again]

Results go to ``benchmarks/results/zoo.json`` one by one, so a run that was cut goes on; the table in ``docs/zoo.md`` is
written from them at the end. The exit status is the number of denoisers that this project fails.
"""

from __future__ import annotations

import argparse
import sys
import warnings

import torch

from benchmarks.records import Records
from benchmarks.zoo.specimens import every_specimen
from benchmarks.zoo.stages import run_stages
from benchmarks.zoo.table import write_page


def main(arguments: list[str]) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="these classes only")
    parser.add_argument("--again", action="store_true", help="measure what is on record, too")
    args = parser.parse_args(arguments)
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    records = Records("zoo", {"diffusers": diffusers.__version__})
    for family, name, cls, specimen in every_specimen():
        if args.names and name not in args.names:
            continue
        if args.again or name not in records.data:
            outcome = run_stages(name, cls, specimen)
            records.put(name, {"family": family, **outcome.record()})
            print(f"{name}: {outcome.failed or 'all stages'} {outcome.error}", flush=True)
    outcomes = {name: entry for name, entry in records.data.items() if name != "settings"}
    write_page(outcomes)
    return sum(bool(entry["failed"]) and not entry["outside"] for entry in outcomes.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
