"""A recording that several processes share: each samples some batches into a folder of its own, then they are joined.

The joined set holds the calls in the order in which one process would have made them, so it has the hash that one
process's has.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from dq_plugins.calibration.calibration_set import CalibrationSet
from dq_plugins.calibration.call_records import tensor_keys
from dq_plugins.calibration.storage import ShardReader, read_manifest
from dq_plugins.calibration.writer import CalibrationWriter
from dq_plugins.workers import Pool

Record = Callable[..., CalibrationSet]


@runtime_checkable
class Divisible(Protocol):
    """A sampler that can do a part of its work: `dq_diffusers.recording.PipelineSampler` is one."""

    @property
    def batches(self) -> int:
        """Sampling runs, which do not depend on each other."""
        ...

    def part(self, start: int, stop: int) -> Callable[[nn.Module], Any]:
        """A sampler that does the runs ``start`` to ``stop - 1`` alone, as the whole would. Picklable."""
        ...


@dataclass(frozen=True)
class Runs:
    """Sampling runs as one sampler that several processes can share.

    Example::

        draws = Runs([partial(draw, prompt) for prompt in prompts])     # draw(prompt, denoiser)
        calib = dq_plugins.record(denoiser, draws, "calib/")
    """

    runs: Sequence[Callable[[nn.Module], Any]]

    @property
    def batches(self) -> int:
        """How many."""
        return len(self.runs)

    def part(self, start: int, stop: int) -> Runs:
        """Some of them."""
        return Runs(self.runs[start:stop])

    def __call__(self, denoiser: nn.Module) -> None:
        """All of them, in their order."""
        for run in self.runs:
            run(denoiser)


def record_parts(record: Record, denoiser: nn.Module, sample: Divisible, out: Path, pool: Pool) -> list[Path]:
    """Record the parts, each beside ``out``; what an interrupted call recorded of them is not computed again.

    Args:
        record: `dq_plugins.record` of a denoiser, a sampler and a folder.
        denoiser: full precision.
        sample: the whole.
        out: folder that the whole is for.
        pool: who shares the work.
    """
    count = min(pool.count, sample.batches)
    edges = [sample.batches * i // count for i in range(count + 1)]
    folders = [out.with_name(f"{out.name}.part-{i}-of-{count}") for i in range(count)]
    parts = [sample.part(start, stop) for start, stop in pairwise(edges)]
    pool.run([partial(_record_part, record, denoiser, *each) for each in zip(parts, folders, strict=True)])
    return folders


def _record_part(record: Record, denoiser: nn.Module, part: Callable[[nn.Module], Any], folder: Path) -> None:
    record(denoiser, part, folder)  # and no result: it would be sent back


def join(parts: Sequence[Path], writer: CalibrationWriter) -> None:
    """Append the calls of complete calibration sets, in order, and delete these; memory holds one shard."""
    for folder in parts:
        manifest = read_manifest(folder)
        reader = ShardReader(folder, manifest.shards)
        for call in manifest.calls:
            nodes = (*call.inputs.values(), call.output)
            keys = {key for node in nodes for key in tensor_keys(node) if not writer.knows(key)}
            tensors: dict[str, Tensor] = {key: reader.get(key) for key in keys}
            writer.append(call, tensors)
    writer.finish()
    for folder in parts:
        shutil.rmtree(folder)
