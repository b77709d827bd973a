"""Run every benchmark, one after the other: ``python -m benchmarks``; or the named ones."""

from __future__ import annotations

import subprocess
import sys

COMMANDS = {
    "timestep-groups": ["benchmarks.timestep_groups"],
    "timestep-groups-asymmetric": ["benchmarks.timestep_groups", "--asymmetric"],
    "adp": ["benchmarks.adp"],
    "adp-selection": ["benchmarks.adp_selection"],
    "latency": ["benchmarks.latency"],
    "size": ["benchmarks.size", "--full-size"],
    "full-size": ["benchmarks.full_size"],
    "planning-w8a8": ["benchmarks.planning", "--weight-bits", "8"],
    "planning-w4a8": ["benchmarks.planning", "--weight-bits", "4"],
    "weight-only": ["benchmarks.weight_only"],
    "temporal-table": ["benchmarks.temporal_table", "--full-size"],
    "tfmq-digits": ["benchmarks.tfmq", "--model", "digits"],
    "tfmq-emoji": ["benchmarks.tfmq", "--model", "emoji"],
    "rounding-digits-30": ["benchmarks.rounding", "--model", "digits", "--iterations", "30", "--steps", "4"],
    "rounding-digits-120": ["benchmarks.rounding", "--model", "digits"],
    "rounding-emoji-120": ["benchmarks.rounding", "--model", "emoji"],
    "solvers": ["benchmarks.solvers"],
    "mixdq-sensitivity": ["benchmarks.mixdq_sensitivity", "--model", "digits"],
    "mixdq-plans-digits": ["benchmarks.mixdq_plans", "--model", "digits"],
    "mixdq-plans-emoji": ["benchmarks.mixdq_plans", "--model", "emoji"],
    "mixdq-bos": ["benchmarks.mixdq_bos"],
    "tmpq-digits": ["benchmarks.tmpq", "--model", "digits"],
    "tmpq-emoji": ["benchmarks.tmpq", "--model", "emoji", "--images", "2"],
    "tmpq-supernet": ["benchmarks.tmpq", "--part", "supernet"],
    "drift-digits": ["benchmarks.drift", "--model", "digits"],
    "drift-emoji": ["benchmarks.drift", "--model", "emoji"],
    "drift-terrain": ["benchmarks.drift", "--model", "terrain", "--steps", "4", "--images", "4"],
    "transforms-digits-w4a4": ["benchmarks.transforms", "--seeds", "1"],
    "transforms-digits-w4a8": [
        "benchmarks.transforms",
        "--act-bits",
        "8",
        "--seeds",
        "1",
        "--ingredients",
        "groups",
        "rotation",
    ],
    "exempt-layers": ["benchmarks.exempt_layers"],
    "brevitas-qat": ["benchmarks.brevitas_qat"],
    "zoo": ["benchmarks.zoo"],
    "peers": ["benchmarks.peers"],
    "demo-emoji": ["benchmarks.demo", "--model", "emoji"],
    "demo-digits": ["benchmarks.demo", "--model", "digits"],
}


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all; the exit status is the number that failed."""
    unknown = [name for name in names if name not in COMMANDS]
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    failed = 0
    for name in names or COMMANDS:
        print(f"== {name}: python -m {' '.join(COMMANDS[name])}", flush=True)
        failed += subprocess.run([sys.executable, "-m", *COMMANDS[name]]).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
