"""Where the time of one integer step goes, and how near it comes to what the processor can do.

    python -m benchmarks.profile_step --model dit            # eager
    python -m benchmarks.profile_step --model unet --compile

One thread, CPU time. The time of each kind of work is what PyTorch's profiler sees of its operators; what is missing to
the time of a step without a profiler is Python, guards and allocation.

Two bounds: the int8 operations of a step by the processor's int8 rate, measured in the same run at the shape that the
kernel multiplies fastest (`RATE_SHAPE`); and the bytes that all other operators of the eager step read and write, by
the rate of a copy. Without merging operators, no step takes less than both together.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import dq_torchao  # noqa: F401  # registers the operators
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import MODELS
from benchmarks.records import Records
from benchmarks.variants import VARIANTS
from dq_plugins.report import Table

VARIANT = "W8A8, 8 groups, attention (ours)"
RATE_SHAPE = (2016, 1024, 256)
"""Rows, inputs and outputs of a product whose parts stay in the cache, and which takes far longer than calling it."""
COPY_BYTES = 64 << 20
PRODUCTS = ("int8_linear", "int8_conv2d", "product", "qlinear_pointwise", "qconv_pointwise")
KINDS = {
    "loops of the compiler": ("cpp_fused",),  # first: their names list what they are made from
    "products of layers": PRODUCTS,
    "attention": ("int8_attention",),
    "codes of inputs": ("activation_codes", "dynamic_codes"),
    "normalisation": ("native_layer_norm", "native_group_norm", "row_statistics", "group_statistics"),
    "activation functions": ("gelu", "silu"),
}
REST = "other operators"


def keep_memory() -> None:
    """Have glibc keep what is freed: it would give pages back and fault them in again, a tenth of a step, at random."""
    if platform.system() == "Linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


def cpu_ms(call: Callable[[], object], rounds: int = 20) -> float:
    """First decile of the CPU time of a call, after two that do not count."""
    times = []
    for _ in range(rounds + 2):
        start = time.thread_time()
        call()
        times.append((time.thread_time() - start) * 1e3)
    return statistics.quantiles(times[2:], n=10)[0]


def rates() -> dict[str, float]:
    """Thousand million int8 operations, and bytes copied (read and written), in a second."""
    rows, inputs, outputs = RATE_SHAPE
    codes = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8)
    weight = torch.randint(0, 256, (outputs * inputs,), dtype=torch.uint8)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    stored = (weight, [outputs, inputs], 8, False, None, None, torch.ones(outputs), None, torch.float32)
    x = torch.ones(COPY_BYTES // 4)
    y = torch.empty_like(x)
    product = cpu_ms(lambda: torch.ops.dq_torchao.int8_linear(codes, one, zero, *stored))
    return {
        "int8": 2 * rows * inputs * outputs / product / 1e6,
        "copy": 2 * x.nbytes / cpu_ms(lambda: y.copy_(x)) / 1e6,
    }


class Counting(TorchDispatchMode):
    """Counts int8 operations by kind and the bytes that the other operators of an eager call read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = function(*args, **(kwargs or {}))
        name = function.name().split("::")[1]
        if name in ("int8_linear", "int8_conv2d"):
            self.operations["products of layers"] += 2 * y.numel() * prod(args[4][1:])
        elif name == "int8_attention":
            self.operations["attention"] += 2 * prod(args[0].shape) * args[1].shape[2] * 2
        elif not function.is_view:
            moved = [x for x in (*args, *(y if isinstance(y, tuple | list) else [y])) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in moved)
        return y


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), REST)


def by_kind(run: Callable[[], object], steps: int = 10) -> dict[str, float]:
    """CPU ms of a step by kind, as the profiler sees them; an operator's own time, without what it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        wall, cpu = time.perf_counter(), time.thread_time()
        for _ in range(steps):
            run()
        share = (time.thread_time() - cpu) / (
            time.perf_counter() - wall
        )  # of a core: the profiler's clock is the wall's
    found: Counter[str] = Counter()
    for event in seen.key_averages():
        if "::" in event.key or "cpp_fused" in event.key:  # not what the compiler calls its own wrappers
            found[kind_of(event.key)] += event.self_cpu_time_total / 1e3 / steps * share
    return dict(found)


@torch.no_grad()
def measure(model_name: str, compiled: bool) -> dict[str, Any]:
    """Of one denoiser: ms by kind, their bounds, and what those follow from."""
    torch.set_num_threads(1)
    keep_memory()
    model = MODELS[model_name]()
    denoiser, inputs = VARIANTS[VARIANT](model), model.inputs(500, 0)
    with Counting() as counted:
        denoiser(**inputs)
    # without caches: they may hold loops that do not tell the profiler their names
    options = {"cpp.enable_kernel_profile": True, "force_disable_caches": True}
    with inductor_config.patch(options):
        run: Any = torch.compile(denoiser, dynamic=False) if compiled else denoiser
        step = cpu_ms(lambda: run(**inputs))
        kinds = by_kind(lambda: run(**inputs))
    found = rates()
    bound = {kind: count / found["int8"] / 1e6 for kind, count in counted.operations.items()}
    memory = counted.bytes / found["copy"] / 1e6
    return {
        "step": step,
        "kinds": kinds | {"Python, guards, allocation": max(step - sum(kinds.values()), 0.0)},
        "bound": bound,
        "memory": memory,
        "rates": found,
        "operations": dict(counted.operations),
        "bytes": counted.bytes,
    }


def rows(found: dict[str, Any]) -> Iterator[list[Any]]:
    for kind, ms in sorted(found["kinds"].items(), key=lambda pair: -pair[1]):
        bound = found["bound"].get(kind)
        yield [kind, f"{ms:.1f}", f"{ms / found['step']:.0%}", "" if bound is None else f"{bound:.1f}"]
    yield ["all", f"{found['step']:.1f}", "100%", f"{sum(found['bound'].values()) + found['memory']:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["dit", "unet"], default="dit")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    mode = "compiled" if arguments.compile else "eager"
    records = Records(f"profile-{arguments.model}-{mode}", {"model": arguments.model, "mode": mode, "threads": 1})
    found = measure(arguments.model, arguments.compile)
    records.put("step", found)
    rate = found["rates"]
    print(f"{arguments.model}, {mode}; int8 {rate['int8']:.0f} GOP/s, copy {rate['copy']:.1f} GB/s\n")
    print(Table(["work", "CPU ms", "of the step", "bound, ms"], list(rows(found))))


if __name__ == "__main__":
    main()
