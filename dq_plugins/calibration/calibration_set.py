"""Recorded full-precision denoiser calls, streamed from disk by timestep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from dq_plugins.calibration.call import Call, timestep_of, timestep_values
from dq_plugins.calibration.call_records import decode, tensor_keys
from dq_plugins.calibration.schema import Manifest
from dq_plugins.calibration.storage import WAY_OUT, ShardReader, check_shards, read_manifest
from dq_plugins.errors import CalibrationError
from dq_plugins.hashing import hash_json
from dq_plugins.timesteps import Schedule, by_sample_or_token


def timestep_range(timesteps: Sequence[float]) -> tuple[float, float]:
    """From and to where ranges learned at some timesteps, ascending, are taken to hold: one gap beyond them.

    The gap is the largest distance between neighbours (0 when there is one timestep): another number of steps of the
    same sampler stays inside.
    """
    gap = max((b - a for a, b in pairwise(timesteps)), default=0.0)
    return timesteps[0] - gap, timesteps[-1] + gap


class CalibrationSet:
    """A recording, or a part of one. Nothing is held in memory but the index.

    Get one from `dq_plugins.record` or `CalibrationSet.open`. When the samples of a batch have different timesteps,
    the call counts for each of them, and `calls` gives for one timestep only the samples that have it.

    Example::

        for t in calib.timesteps:
            for call in calib.calls(t):
                assert torch.equal(call.run(denoiser), call.output)
    """

    def __init__(
        self, folder: Path, manifest: Manifest, selection: Sequence[tuple[int, float]], images: int | None = None
    ) -> None:
        """Use `open`; ``selection`` lists (call, timestep) pairs in recorded order; ``images``: of each call."""
        self.folder = folder
        self._manifest = manifest
        self._reader = ShardReader(folder, manifest.shards)
        self._selection = tuple(selection)
        self._images = images

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> CalibrationSet:
        """Open a calibration set.

        Args:
            path: its folder.
            verify: read every shard and compare its hash; otherwise only presence and size are checked.

        Raises:
            CalibrationError: there is none, or it is incomplete, empty, damaged, or of a newer format.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        if not manifest.complete:
            raise CalibrationError(
                f"{folder} holds {len(manifest.calls)} calls and is incomplete: its recording was interrupted. Resume "
                "it by calling record again with the same sampler and the same folder."
            )
        if not manifest.calls:
            raise CalibrationError(f"{folder} is empty: it holds no denoiser calls. Record it again.")
        check_shards(folder, manifest, content=verify)
        pairs = [(i, t) for i, call in enumerate(manifest.calls) for t in call.distinct]
        return cls(folder, manifest, pairs)

    def __len__(self) -> int:
        return len({index for index, _ in self._selection})

    def __repr__(self) -> str:
        return f"CalibrationSet({self.folder}: {len(self)} calls of {self.model} at {len(self.timesteps)} timesteps)"

    @property
    def model(self) -> str:
        """Class name of the denoiser."""
        return self._manifest.model

    @property
    def model_hash(self) -> str:
        """`dq_plugins.hashing.weights_hash` of the denoiser."""
        return self._manifest.model_hash

    @property
    def timestep_argument(self) -> str:
        """Name of the denoiser's argument that carries the timestep."""
        return self._manifest.timestep_argument

    @property
    def schedule(self) -> Schedule:
        """Timesteps of the first sampling run, in the order it visited them."""
        return self.schedules[0]

    @property
    def sampler(self) -> dict[str, Any] | None:
        """Description of the sampler, if it gave one: ``adapter`` names who can run it again."""
        return self._manifest.sampler

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The distinct schedules of the recording, in order of first appearance."""
        return tuple(Schedule(tuple(timesteps)) for timesteps in self._manifest.schedules)

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        """Distinct timesteps, ascending."""
        return tuple(sorted({t for _, t in self._selection}))

    @property
    def uniform(self) -> bool:
        """Whether all samples and tokens of a call have one timestep, in every call."""
        return all(len(call.distinct) == 1 for call in self._manifest.calls)

    @property
    def timestep_range(self) -> tuple[float, float]:
        """Timesteps for which ranges learned here are taken to hold: the recorded ones, and one gap beyond.

        See `dq_plugins.calibration.calibration_set.timestep_range`.
        """
        return timestep_range(self.timesteps)

    @cached_property
    def hash(self) -> str:
        """sha256 of what is recorded and selected, whatever the division into shards."""
        manifest = self._manifest
        calls = [call.model_dump(mode="json") for call in manifest.calls]
        some = [] if self._images is None else [self._images]
        return hash_json([manifest.model_hash, manifest.timestep_argument, calls, self._selection, *some])

    def check_model(self, model_hash: str) -> None:
        """Raise `CalibrationError` unless the set was recorded from the model with these weights."""
        if model_hash != self.model_hash:
            raise CalibrationError(
                f"{self.folder} was recorded from other weights of {self.model}: hash {self.model_hash[:12]}, this "
                f"denoiser has {model_hash[:12]}. Record a calibration set from this denoiser, or load the weights "
                "it was recorded from."
            )

    def calls(self, timestep: float | None = None) -> Iterator[Call]:
        """Recorded calls, each read from disk when it is its turn.

        Args:
            timestep: only calls at this timestep, and of a batch with several only the samples that have it.
                None: every call, in recorded order; a call of several timesteps comes whole, unless the selection
                leaves some out: then once for each that is left.

        Raises:
            CalibrationError: nothing was recorded at this timestep.
        """
        if timestep is not None:
            yield from self._calls_at(float(timestep))
            return
        kept: dict[int, list[float]] = {}
        for index, t in self._selection:
            kept.setdefault(index, []).append(t)
        for index, timesteps in kept.items():
            if len(timesteps) == len(self._manifest.calls[index].distinct):
                yield self._call(index)
            else:
                yield from (self._call(index, t) for t in timesteps)

    def count(self, timestep: float) -> int:
        """Number of calls at a timestep."""
        return sum(t == timestep for _, t in self._selection)

    def call(self, timestep: float, position: int) -> Call:
        """One of the calls at a timestep, by its position among them; only this one is read.

        Raises:
            CalibrationError: there are not so many.
        """
        indices = [index for index, t in self._selection if t == timestep]
        if not 0 <= position < len(indices):
            raise CalibrationError(
                f"{self.folder} has {len(indices)} calls at timestep {timestep:g}, so there is no number {position}"
            )
        return self._call(indices[position], timestep)

    def _calls_at(self, timestep: float) -> Iterator[Call]:
        if timestep not in self.timesteps:
            nearest = min(self.timesteps, key=lambda t: abs(t - timestep))
            raise CalibrationError(
                f"{self.folder} has no calls at timestep {timestep:g}; the nearest of its {len(self.timesteps)} "
                f"timesteps is {nearest:g}"
            )
        yield from (self._call(index, t) for index, t in self._selection if t == timestep)

    def _call(self, index: int, timestep: float | None = None) -> Call:
        record = self._manifest.calls[index]
        kwargs = {name: decode(node, self._reader.get) for name, node in record.inputs.items()}
        output = self._reader.get(next(tensor_keys(record.output)))
        argument = self.timestep_argument
        call = Call(index, timestep_of(kwargs, argument), kwargs, output)
        if timestep_values(call.timestep) != record.timesteps:
            raise CalibrationError(
                f"{self.folder}: call {index} was made at timestep {timestep_values(call.timestep)[:4]}, and the "
                f"manifest says {record.timesteps[:4]}. {WAY_OUT}"
            )
        if timestep is not None and len(record.distinct) > 1:
            of_samples = by_sample_or_token(call.timestep)
            rows = (of_samples.reshape(len(of_samples), -1) == timestep).any(1).nonzero().flatten()
            call = call if len(rows) == len(of_samples) else call.rows(rows, len(of_samples))
        return call if self._images is None else call.some(self._images)

    def example_inputs(self) -> dict[str, Any]:
        """Arguments of the first call: example inputs to trace the denoiser with."""
        return next(self.calls()).kwargs

    def spread(self, count: int, samples: int | None = None) -> CalibrationSet:
        """At most ``count`` calls, evenly over the recording, so that every part of the schedule is seen.

        Args:
            count: of calls.
            samples: of all these calls together, as many of each, see `Call.some`; None: whole calls.
        """
        calls = list(dict.fromkeys(index for index, _ in self._selection))
        last, wanted = len(calls) - 1, min(count, len(calls))
        spread = {calls[round(i * last / max(wanted - 1, 1))] for i in range(wanted)}
        chosen = [pair for pair in self._selection if pair[0] in spread]
        each = self._images if samples is None else -(-samples // len(spread))
        return CalibrationSet(self.folder, self._manifest, chosen, each)

    def subset(
        self,
        timesteps: Iterable[float] | None = None,
        *,
        calls: Iterable[int] | None = None,
        per_timestep: int | Mapping[float, int] | None = None,
    ) -> CalibrationSet:
        """A part of this set; nothing is copied.

        Args:
            timesteps: keep these timesteps.
            calls: keep the calls with these `Call.index`.
            per_timestep: keep the first so many calls of every timestep; a mapping gives a number for each, and none
                for those it lacks.

        Raises:
            CalibrationError: nothing is left, or a timestep was not recorded.
        """
        wanted = None if timesteps is None else {float(t) for t in timesteps}
        unknown = sorted((wanted or set()) - set(self.timesteps))
        if unknown:
            raise CalibrationError(f"{self.folder} has no calls at timestep {unknown[0]:g}")
        indices = None if calls is None else set(calls)
        taken: dict[float, int] = {}
        kept: list[tuple[int, float]] = []
        for index, t in self._selection:
            if (wanted is None or t in wanted) and (indices is None or index in indices):
                taken[t] = taken.get(t, 0) + 1
                limit = per_timestep.get(t, 0) if isinstance(per_timestep, Mapping) else per_timestep
                if limit is None or taken[t] <= limit:
                    kept.append((index, t))
        if not kept:
            raise CalibrationError(f"this selection leaves none of the {len(self)} calls of {self.folder}")
        return CalibrationSet(self.folder, self._manifest, kept, self._images)
