"""One product for layers that share an input (query, key, value), or one for each: what the former would gain.

    python -m benchmarks.shared_inputs

CPU time of one thread, interleaved, of the kernel that layers use, on the same codes. Writes the table as JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dq_torchao.kernels.panels import panels
from dq_torchao.kernels.product import LINEAR, product

from benchmarks.records import Records
from dq_plugins.metrics.latency import compare_latency, thread_clock
from dq_plugins.report import Table

SHAPES = (
    (512, 384, 384),
    (512, 768, 768),
    (2048, 320, 320),
    (512, 640, 640),
    (128, 1280, 1280),
    (8192, 128, 128),
)
"""Rows, input channels, outputs of each of three layers."""
LAYERS, CALLS = 3, 20


def layer(weight: torch.Tensor) -> tuple[Any, ...]:
    """What the kernel takes of a layer with int8 codes ``[O, K]``."""
    return panels(weight), weight.sum(1, dtype=torch.int32), torch.full((len(weight),), 1e-3), torch.zeros(len(weight))


def measured(rows: int, channels: int, outputs: int) -> dict[str, Any]:
    """Milliseconds of three products, of one, and of one whose result is cut into three contiguous parts."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (rows, channels), dtype=torch.uint8, generator=generator)
    weights = torch.randint(-127, 128, (LAYERS * outputs, channels), dtype=torch.int8, generator=generator)
    scale, zero = torch.tensor([1e-2]), torch.tensor([128], dtype=torch.int32)
    apart, whole = [layer(part) for part in weights.split(outputs)], layer(weights)

    def one() -> torch.Tensor:
        return product(codes, scale, zero, *whole, *LINEAR)

    def three() -> list[torch.Tensor]:
        return [product(codes, scale, zero, *each, *LINEAR) for each in apart]

    def cut() -> list[torch.Tensor]:
        return [part.contiguous() for part in one().split(outputs, 1)]

    assert all(torch.equal(a, b) for a, b in zip(three(), cut(), strict=True))
    ways: dict[str, Callable[[], object]] = {"three": three, "one": one, "one, cut into parts": cut}
    repeated = {name: lambda way=way: [way() for _ in range(CALLS)] for name, way in ways.items()}
    found = compare_latency(repeated, rounds=25, clock=thread_clock(torch.device("cpu")))
    return {name: latency.median / CALLS for name, latency in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    records, rows = Records("shared_inputs", {"layers": LAYERS}), []
    for shape in SHAPES:
        label = "{} x {} -> 3 x {}".format(*shape)
        ms = records.get(label, lambda shape=shape: (ms := measured(*shape)) | {"gain": ms["three"] / ms["one"]})
        rows.append([label, *(round(ms[k], 3) for k in ("three", "one", "one, cut into parts")), round(ms["gain"], 3)])
    print(Table(["shape", "three, ms", "one", "one, cut into parts", "three / one"], rows))


if __name__ == "__main__":
    main()
