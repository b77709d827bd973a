"""Recording: run full-precision sampling and keep every denoiser call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dq_plugins.calibration.calibration_set import CalibrationSet
from dq_plugins.calibration.call import bind, first_tensor, timestep_of, timestep_values, token_timesteps
from dq_plugins.calibration.call_records import decode, encode, is_tensor, leaf_nodes
from dq_plugins.calibration.parts import Divisible, join, record_parts
from dq_plugins.calibration.schema import CallRecord
from dq_plugins.calibration.storage import START_OVER
from dq_plugins.calibration.writer import CalibrationWriter
from dq_plugins.compiled import evaluating
from dq_plugins.errors import CalibrationError, NeverCalledError
from dq_plugins.exclusive import exclusive
from dq_plugins.full_precision import require_full_precision, require_uncached
from dq_plugins.graph.arguments import find_timestep_argument, forward_signature, named_leaves
from dq_plugins.lookalike import Lookalike, change_class, lookalike
from dq_plugins.workers import pool


def record(
    denoiser: nn.Module,
    sample: Callable[[nn.Module], Any],
    out: str | Path,
    *,
    timestep: str | None = None,
    total: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> CalibrationSet:
    """Record the denoiser calls of full-precision sampling into a folder.

    An interrupted recording is resumed by the same call: ``sample`` runs again from its start, the calls that are
    on disk are answered from there without computing the denoiser, and recording goes on after them. This needs a
    sampler that does the same every time: seed it inside ``sample``. On a complete recording the same call checks
    that the sampler still does what was recorded, and adds whatever it does beyond.

    Inside ``with dq_plugins.workers.workers(4):`` processes share the batches of a sampler that can be divided
    (`dq_plugins.calibration.parts.Divisible`), and the set has the hash that one process's has.

    Args:
        denoiser: full-precision denoiser. It runs in eval mode without gradients, and is left as it was found.
        sample: runs sampling, for example ``lambda denoiser: pipe(prompt, generator=torch.manual_seed(0))`` where
            ``pipe`` holds this denoiser. Its result is not used. An attribute ``description`` (JSON data, with the
            name of an ``adapter``) is kept, so that passes can run the same sampler over other timesteps.
        out: folder of the calibration set.
        timestep: name of the denoiser's timestep argument, where it is not a usual one.
        total: number of denoiser calls, for the time to the end in the progress bar; by default what an attribute
            ``total`` of ``sample`` says.
        overwrite: delete a calibration set that is in ``out`` and start over.
        progress: show a progress bar.

    Returns:
        The complete calibration set.

    Raises:
        PlanError: the denoiser is quantized already, or its weights are offloaded.
        TimestepError: the denoiser has no timestep argument, or a call's timestep is malformed.
        CalibrationError: a call holds NaN or infinity, ``sample`` never called the denoiser, it did something else
            than the calls on disk, or ``out`` holds something else.
    """
    require_full_precision(denoiser)
    require_uncached(denoiser)
    argument = find_timestep_argument(denoiser, timestep)
    with exclusive(out, error=CalibrationError):
        _record(denoiser, sample, Path(out), argument, total, overwrite=overwrite, progress=progress)
    return CalibrationSet.open(out, verify=False)


def _record(
    denoiser: nn.Module,
    sample: Callable[[nn.Module], Any],
    out: Path,
    argument: str,
    total: int | None,
    *,
    overwrite: bool,
    progress: bool,
) -> None:
    writer = CalibrationWriter(
        out,
        denoiser,
        argument,
        overwrite=overwrite,
        sampler=getattr(sample, "description", None),
        settings=getattr(sample, "settings", None),
    )
    sharing = pool()
    if sharing.count > 1 and not writer.calls and isinstance(sample, Divisible) and sample.batches > 1:
        each = partial(record, timestep=argument, overwrite=overwrite, progress=False)
        join(record_parts(each, denoiser, sample, out, sharing), writer)
        return
    total = getattr(sample, "total", None) if total is None else total
    recorder = _Recorder(writer, forward_signature(denoiser))
    done = len(writer.calls)
    with tqdm(desc="recording", unit="call", total=total, initial=done, disable=not progress) as bar:
        try:
            with evaluating(denoiser), _calls_answered(denoiser, recorder, bar):
                sample(denoiser)
            recorder.check_finished()
        except BaseException:
            if len(writer.calls) > done:
                writer.flush()
            raise
    writer.finish()


class _Recorder:
    """Answers denoiser calls: from disk while there are recorded ones, by computing and recording them after."""

    def __init__(self, writer: CalibrationWriter, signature: inspect.Signature) -> None:
        self.writer = writer
        self.signature = signature
        self.position = 0

    def __call__(self, compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer one call; ``compute`` is the denoiser itself."""
        argument = self.writer.timestep_argument
        named = bind(self.signature, args, kwargs)
        given = timestep_of(named, argument)
        timestep = timestep_values(given)
        where = f"call {self.position} (timestep {', '.join(f'{t:g}' for t in timestep[:4])})"
        tensors: dict[str, Tensor] = {}
        # Encoded before the denoiser runs: it, or the sampler after it, may change its inputs in place.
        inputs = {name: encode(f"{where}: argument {name}", v, tensors) for name, v in named.items()}
        if self.position < len(self.writer.calls):
            output = self._replay(where, inputs, tensors, _device(named))
        else:
            output = compute(*args, **kwargs)
            first_tensor(output)
            encoded = encode(f"{where}: output", output, tensors)
            record = CallRecord(
                timesteps=timestep, token_timesteps=token_timesteps(given), inputs=inputs, output=encoded
            )
            self.writer.append(record, tensors)
        self.position += 1
        return output

    def _replay(self, where: str, inputs: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> Any:
        recorded = self.writer.calls[self.position]
        if inputs != recorded.inputs:
            difference = self._difference(recorded.inputs, inputs, tensors)
            self._refuse_other_settings(f"{where}: {difference}")
            raise CalibrationError(
                f"{where} differs from the one recorded in {self.writer.folder}: {difference}. "
                "Resuming needs a sampler that does the same "
                "every time: seed it inside `sample` (generator=torch.manual_seed(...)), with the same prompts, "
                f"steps and scheduler; or {START_OVER}."
            )
        return decode(recorded.output, lambda key: self.writer.fetch(key).to(device))

    def _refuse_other_settings(self, seen: str) -> None:
        """Raise `CalibrationError` with the settings that are others than those of the recording, if they are known."""
        others = self.writer.other_settings
        if others:
            raise CalibrationError(
                f"{self.writer.folder} was recorded with other settings: {'; '.join(others)} ({seen}). Give those "
                f"settings to go on, choose another folder, or {START_OVER}."
            )

    def _difference(self, old: dict[str, Any], new: dict[str, Any], tensors: dict[str, Tensor]) -> str:
        old_leaves = {path: leaf for name, node in old.items() for path, leaf in leaf_nodes(name, node)}
        new_leaves = {path: leaf for name, node in new.items() for path, leaf in leaf_nodes(name, node)}
        for path in sorted({*old_leaves, *new_leaves}):
            was, now = old_leaves.get(path), new_leaves.get(path)
            if path not in old_leaves or path not in new_leaves:
                return f"argument {path} is {'absent' if path in old_leaves else 'new'}"
            if was == now:
                continue
            if is_tensor(was) and is_tensor(now):
                return f"argument {path} {_tensor_difference(self.writer.fetch(was['tensor']), tensors[now['tensor']])}"
            return f"argument {path} was {_leaf_text(was)}, is {_leaf_text(now)}"
        return "its arguments are nested differently"

    def check_finished(self) -> None:
        """Raise `CalibrationError` unless sampling made calls, and as many as were recorded before."""
        if not self.writer.calls:
            raise NeverCalledError(
                "the sampler never called the denoiser, so nothing was recorded. `sample` gets the denoiser and must "
                "run sampling with that very module (a pipeline must hold the same object, not a copy)."
            )
        if self.position < len(self.writer.calls):
            self._refuse_other_settings(f"{self.position} calls instead of {len(self.writer.calls)}")
            raise CalibrationError(
                f"the sampler made {self.position} denoiser calls; {self.writer.folder} already holds "
                f"{len(self.writer.calls)}, recorded by a longer run. Use that calibration set, run the sampler it "
                f"was recorded with, or {START_OVER}."
            )


def _leaf_text(leaf: Any) -> str:
    return "a tensor" if is_tensor(leaf) else repr(leaf)


def _tensor_difference(was: Tensor, now: Tensor) -> str:
    if was.shape != now.shape or was.dtype != now.dtype:
        return f"was {was.dtype} {tuple(was.shape)}, is {now.dtype} {tuple(now.shape)}"
    return f"differs by up to {float((was.double() - now.double()).abs().max()):.3g}"


def _device(named: dict[str, Any]) -> torch.device:
    # of the largest tensor: the timestep alone may live on the host
    found = [value for _, value in named_leaves(named) if isinstance(value, Tensor)]
    return max(found, key=Tensor.numel).device if found else torch.device("cpu")


@contextmanager
def _calls_answered(denoiser: nn.Module, recorder: _Recorder, bar: tqdm[Any]) -> Iterator[None]:
    # The class's __call__: a hook cannot answer a call without running the denoiser, and a forward of the instance is
    # lost where a pipeline takes its offloading off and puts it on again, and traced where the denoiser is compiled.
    class Answering(Lookalike):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            before = len(recorder.writer.calls)
            output = recorder(super().__call__, args, kwargs)  # type: ignore[misc]
            bar.update(len(recorder.writer.calls) - before)
            return output

    own = type(denoiser)
    change_class(denoiser, lookalike(own, Answering))
    try:
        yield
    finally:
        change_class(denoiser, own)
