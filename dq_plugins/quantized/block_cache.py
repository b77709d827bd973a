"""Inputs and targets of blocks, recorded on disk and read back a call at a time.

The target is the full-precision block's output in the full-precision denoiser; the input is what the block gets in a
denoiser whose layers are already quantized ("asymmetric" reconstruction: a block also mends what came before it).

Every recorded call is paid once in full precision, which gives the targets of all blocks, and once quantized: blocks
come in execution order, and the outputs of finished ones are handed on to the next. Memory holds one call at a time,
whatever the number of calls; on disk lie the outputs of finished blocks, the targets of the others, and the inputs of
one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dq_plugins.calibration import CalibrationSet
from dq_plugins.calibration.call import first_tensor
from dq_plugins.errors import CalibrationError
from dq_plugins.hooks import hooked
from dq_plugins.quantized.reconstruction_units import Unit
from dq_plugins.quantized.replay import Replay
from dq_plugins.quantized.run import QuantizedRun, States
from dq_plugins.quantized.shelf import Shelf


class BlockCall(NamedTuple):
    """One recorded call of a block: its arguments, the output it should have, and the timestep of the denoiser."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    timestep: Tensor


class BlockCache:
    """Recorded calls of one block.

    Args:
        shelf: where they lie.
        unit: the block.
        stream: of the recorder.
        count: how many calls there are.
    """

    def __init__(self, shelf: Shelf, unit: Unit, stream: str, count: int) -> None:
        self.unit = unit
        self._shelf, self._stream, self._count = shelf, stream, count

    def __len__(self) -> int:
        return self._count

    def get(self, index: int) -> BlockCall:
        """One call."""
        args, kwargs, timestep = self._shelf.get(("input", self._stream, self.unit.module, index))
        return BlockCall(args, kwargs, self._shelf.get(("target", self.unit.module, index)), timestep)


class BlockRecorder:
    """Records the calls of one block after the other.

    Args:
        units: the blocks, in execution order.
        calls: recorded calls of the denoiser to use.
        folder: an empty folder, which the caller removes.
        others: further units whose outputs are handed on, because nothing about them is learned.
    """

    def __init__(self, units: list[Unit], calls: CalibrationSet, folder: Path, others: Iterable[Unit] = ()) -> None:
        self.units, self.calls = units, calls
        self.shelf = Shelf(folder)
        self._handed_on = _handed_on([*units, *others])
        self._replays: dict[str, Replay] = {}

    def record(self, run: QuantizedRun, unit: Unit, states: Callable[[], States], stream: str = "") -> BlockCache:
        """Inputs and targets of a block; those of the blocks before it are gone then.

        Args:
            run: of the denoiser; open.
            unit: not before the one of the last call. States of layers that run before it are final.
            states: what layers compute with when the inputs are made; asked for each call.
            stream: tells apart quantized denoisers whose outputs are handed on side by side.

        Raises:
            CalibrationError: a block does not run, or gives no tensor.
        """
        to_come = [each.module for each in self.units[self.units.index(unit) :]]
        self.shelf.discard(lambda key: key[0] == "target" and key[1] not in to_come)
        self.shelf.discard(lambda key: key[:2] == ("input", stream))
        if ("target", unit.module, 0) not in self.shelf:
            self._record_targets(run, to_come)
        if stream not in self._replays:
            self._replays[stream] = Replay(run.denoiser, self._handed_on, self.shelf, f"output {stream}")
        count = 0
        for place, call in enumerate(self.calls.calls()):
            run.use(states())
            arguments = self._replays[stream].arguments(unit.module, place, call)
            if arguments is None:
                raise _idle([unit.module], call.index)
            self.shelf.put(("input", stream, unit.module, place), (*arguments, call.timestep))
            count = place + 1
        run.use({})
        return BlockCache(self.shelf, unit, stream, count)

    def _record_targets(self, run: QuantizedRun, modules: list[str]) -> None:
        """First outputs of some modules in full precision, all in one run of each call."""
        run.use({})
        found = {name: run.denoiser.get_submodule(name) for name in modules}
        for place, call in enumerate(self.calls.calls()):
            missing = dict.fromkeys(modules)

            def keep(name: str, _: Any, __: Any, output: Any, place: int = place, missing: dict = missing) -> None:
                if name in missing:
                    self.shelf.put(("target", name, place), first_tensor(output))
                    del missing[name]
                if not missing:
                    raise _AllSeen

            with hooked(found, after=keep), torch.no_grad(), suppress(_AllSeen):
                call.run(run.denoiser)
            if missing:
                raise _idle(list(missing), call.index)


def _handed_on(units: list[Unit]) -> list[str]:
    """Modules whose outputs are kept: blocks, and the layers of those blocks that hold others, and run for them."""
    modules = dict.fromkeys(unit.module for unit in units)
    outer = [unit for unit in units if any(name.startswith(f"{unit.module}.") for name in modules)]
    return list(modules | dict.fromkeys(layer for unit in outer for layer in unit.layers))


class _AllSeen(Exception):  # noqa: N818
    """Every block has run; the rest of the denoiser need not."""


def block_loss(run: QuantizedRun, cache: BlockCache, index: int, states: States) -> Tensor:
    """Error of a block's output in one recorded call: squared, summed over channels, mean over positions.

    Args:
        run: of the denoiser; open.
        cache: the block's recorded calls.
        index: which of them.
        states: what the block's layers compute with; differentiable in whatever requires gradients.
    """
    call = cache.get(index)
    run.use(states)
    with run.at(call.timestep):
        output = first_tensor(run.denoiser.get_submodule(cache.unit.module)(*call.args, **call.kwargs))
    return (output - call.target).square().sum(cache.unit.channel_axis).mean()


def _idle(modules: list[str], index: int) -> CalibrationError:
    return CalibrationError(f"block {modules[0]!r} did not run in recorded call {index}, so it cannot be reconstructed")
