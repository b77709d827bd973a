"""Work shared over processes: what is recorded, collected, measured and scored, with the same result as in one.

`workers` shares over processes of joblib: its own, or Dask's or Ray's inside ``with joblib.parallel_config("ray")``.
`over_ranks` shares over those that ``torchrun`` started. Whatever has something to share asks `pool` who is there.

Tasks are sent by cloudpickle between these processes, and nothing of it reaches a file. Each process computes with as
many threads as this one, because some sums depend on the number in their last bit: with ``N`` workers on one machine
give them a part of the cores each (``OMP_NUM_THREADS``).
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, TypeVar

from dq_plugins.errors import DQError

R = TypeVar("R")
T = TypeVar("T")
_FOREVER = timedelta(days=365)  # the other ranks wait while the first works alone


class Pool(Protocol):
    """Processes that share work; ``count`` of them, this one included or not."""

    count: int

    def run(self, tasks: Sequence[Callable[[], R]]) -> list[R]:
        """Results of tasks, in their order; an error in one is raised here."""
        ...


_current: ContextVar[Pool | None] = ContextVar("dq_workers", default=None)


@contextmanager
def workers(count: int) -> Iterator[None]:
    """Share what runs inside over so many processes of joblib.

    Example::

        with dq_plugins.workers.workers(4):
            calib = dq_plugins.record(denoiser, dq_diffusers.recording.sampler(pipe, images=64), "calib/")
            plan = dq_plugins.make_plan(denoiser, calib, workdir="work/")

    Raises:
        DQError: a count below 1.
    """
    if count < 1:
        raise DQError(f"workers are at least 1, got {count}")
    with _using(_Joblib(count)):
        yield


def pool(least: int = 1) -> Pool:
    """Who shares the work now; at least so many of joblib's processes where nobody said anything."""
    found = _current.get()
    return found if found is not None and found.count >= least else _Joblib(least)


def shares(units: Sequence[T], count: int) -> list[list[T]]:
    """Units dealt out in turn to at most so many; none gets nothing."""
    return [list(units[start::count]) for start in range(min(count, len(units)))]


@contextmanager
def _using(pool: Pool | None) -> Iterator[None]:
    token = _current.set(pool)
    try:
        yield
    finally:
        _current.reset(token)


@dataclass(frozen=True)
class _Joblib:
    count: int

    def run(self, tasks: Sequence[Callable[[], R]]) -> list[R]:
        import torch
        from joblib import Parallel, delayed

        if self.count == 1 or len(tasks) == 1:
            return [task() for task in tasks]
        work = delayed(partial(_with_threads, torch.get_num_threads()))
        return list(Parallel(n_jobs=self.count)(work(task) for task in tasks))


def _with_threads(threads: int, task: Callable[[], R]) -> R:
    import torch

    torch.set_num_threads(threads)
    return task()


def over_ranks(run: Callable[[], R]) -> R:
    """Run something on the first rank of ``torch.distributed``, with the other ranks as its workers.

    Every rank calls this, and every rank gets the result. Where there is no group yet, one is made, for as long as the
    process lives.

    Args:
        run: what to do. Called on rank 0 only; what it shares, the others compute.

    Raises:
        DQError: no group, and not started by ``torchrun``.
        Exception: what ``run`` raised, on every rank.

    Example::

        plan = dq_plugins.workers.over_ranks(lambda: dq_plugins.make_plan(denoiser, "calib/", workdir="work/"))
        # torchrun --nproc-per-node 4 script.py
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise DQError("over_ranks shares work over the processes of torchrun: start with `torchrun script.py`")
        dist.init_process_group("gloo", timeout=_FOREVER)
        atexit.register(dist.destroy_process_group)  # torchrun's store knows the addresses of one group only
    group = dist.new_group(backend="gloo", timeout=_FOREVER)  # whatever the backend of a group that was there
    return _lead(_Ranks(group), run) if dist.get_rank() == 0 else _serve(group)


@dataclass(frozen=True)
class _Outcome:
    """What a computation gave: a value, or an error."""

    value: Any = None
    error: BaseException | None = None

    def get(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


def _outcome(run: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(run())
    except Exception as error:  # to be raised where somebody waits for the value
        return _Outcome(error=error)


class _Ranks:
    """The first rank's view of the group."""

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self.group = group
        self.count = dist.get_world_size(group)

    def run(self, tasks: Sequence[Callable[[], R]]) -> list[R]:
        _broadcast(self.group, list(tasks))
        with _using(None):  # a task shares nothing further
            parts = _shared(self.group, tasks)
        by_task = {place: outcome for part in parts for place, outcome in part.items()}
        return [by_task[place].get() for place in range(len(tasks))]


def _lead(ranks: _Ranks, run: Callable[[], R]) -> R:
    with _using(ranks):
        try:
            outcome = _Outcome(run())
        except BaseException as error:
            # the others would wait for ever
            _broadcast(ranks.group, _Outcome(error=error if isinstance(error, Exception) else SystemExit(1)))
            raise
    _broadcast(ranks.group, outcome)
    return outcome.get()


def _serve(group: Any) -> Any:
    while not isinstance(message := _broadcast(group, None), _Outcome):
        _shared(group, message)
    return message.get()


def _shared(group: Any, tasks: Sequence[Callable[[], Any]]) -> list[dict[int, _Outcome]]:
    """Do this rank's share; on rank 0, what all of them did by place of the task."""
    import torch.distributed as dist

    rank, count = dist.get_rank(group), dist.get_world_size(group)
    done = {place: _outcome(tasks[place]) for place in range(rank, len(tasks), count)}
    parts: list[Any] | None = [None] * count if rank == 0 else None
    dist.gather_object(done, parts, dst=0, group=group)
    return parts or []


def _broadcast(group: Any, message: Any) -> Any:
    """From rank 0 to all; functions of a script and lambdas too."""
    import torch.distributed as dist
    from joblib import wrap_non_picklable_objects

    leads = dist.get_rank(group) == 0
    box = [wrap_non_picklable_objects(message, keep_wrapper=False) if leads else None]
    dist.broadcast_object_list(box, src=0, group=group)
    return message if leads else box[0]
