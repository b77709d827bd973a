"""Time the products of binary weights with integer activations: int8 kernel, unpacking first, bit-serial, float32.

    python benchmarks/binary_kernels.py --out binary-kernels.json

Interleaved: every repetition runs each kernel once, so that a slow moment of the machine hits all of them. Least of the
repetitions, one thread. All integer kernels are checked against int64 arithmetic before they are timed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from dq_plugins.passes.binarization import pack_signs, unpack_signs
from dq_plugins.passes.binarization.integer import bit_serial_matmul, int_matmul, pack_rows

SHAPES = [(1, 1024, 1024), (1, 4096, 4096), (16, 1024, 1024), (256, 576, 64), (1024, 1152, 128)]


def measure(m: int, k: int, o: int, bits: int, repetitions: int) -> dict[str, float]:
    """Microseconds by kernel."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (m, k), generator=generator).to(torch.int8)
    weight = (torch.randint(0, 2, (o, k), generator=generator) * 2 - 1).to(torch.int8)
    packed, rows, floats, x = pack_signs(weight), pack_rows(weight), weight.float(), codes.float()
    kernels = {
        "int8, unpacked": lambda: int_matmul(codes, weight),
        "unpack + int8": lambda: int_matmul(codes, unpack_signs(packed, (o, k))),
        "bit-serial": lambda: bit_serial_matmul(codes, rows, bits),
        "float32": lambda: x @ floats.t(),
    }
    exact = codes.long() @ weight.long().t()
    for name, kernel in kernels.items():
        if not torch.equal(kernel().long(), exact):
            raise SystemExit(f"{name} is wrong for {m} x {k} x {o}")
    best = dict.fromkeys(kernels, float("inf"))
    for _ in range(repetitions):
        for name, kernel in kernels.items():
            began = time.perf_counter()
            kernel()
            best[name] = min(best[name], 1e6 * (time.perf_counter() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repetitions", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    for m, k, o in SHAPES:
        for bits in (4, 8):
            times = measure(m, k, o, bits, arguments.repetitions)
            records.append({"rows": m, "inputs": k, "outputs": o, "act_bits": bits, "microseconds": times})
            print(f"{m} x {k} x {o}, A{bits}: " + ", ".join(f"{name} {t:.0f}" for name, t in times.items()))
    if arguments.out:
        arguments.out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
