"""Quantized transformers under diffusers' caches, by whether they were calibrated under the cache.

    python -m benchmarks.caching --images 8 --steps 20

What `examples/under_cache.py` does, for both caches and some widths of inputs; weights have 8 bits. Real integers,
through torchao. PSNR is to the full-precision transformer under the same cache, from the same noise.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path
from typing import Any

from benchmarks.derived import derive
from benchmarks.records import RESULTS, Records
from dq_plugins.report import Table

EXAMPLE = Path(__file__).parents[1] / "examples" / "under_cache.py"
CACHES = {"first-block": 0.15, "taylorseer": 0.0}


def example() -> Any:
    """The example, which is a script."""
    spec = importlib.util.spec_from_file_location("under_cache", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    settings = {"images": args.images, "steps": args.steps, "threshold": CACHES["first-block"]}
    records, module = Records("caching-digits", settings, args.out), example()
    for cache, threshold in CACHES.items():
        for bits in args.bits:
            if f"{cache}, A{bits}, calibrated under the cache, 0" in records.data:
                continue
            found = module.compare(cache, threshold=threshold, bits=bits, count=args.images, steps=args.steps)
            for label, errors in found.items():
                psnr = [10 * math.log10(1 / max(error, 1e-12)) for error in errors]
                records.put(f"{cache}, A{bits}, {label}, 0", {"psnr": psnr})
    rows = [[label, *row.values()] for label, row in derive(records.path.stem, records.data).items()]
    print(Table(["", "PSNR, median", "worst", "error power", "median of seeds"], rows))


if __name__ == "__main__":
    main()
