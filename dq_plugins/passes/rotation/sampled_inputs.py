"""Rows of the inputs of layers, kept from recorded calls: those that give ranges, and those that judge them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.hooks import hooked
from dq_plugins.layer_kinds import kind_of
from dq_plugins.observers.grouping import uniform_groups
from dq_plugins.observers.streaming import first_argument
from dq_plugins.passes.rotation.held_out_error import InputRows
from dq_plugins.quantized.input_rows import input_rows, seen_and_held_out


class SampledInputs:
    """Rows of the inputs of some layers, over calls: those that give ranges, and those that judge them.

    Args:
        denoiser: full precision.
        names: layers.
        count: rows of each call, of either.
    """

    def __init__(self, denoiser: nn.Module, names: Sequence[str], count: int) -> None:
        self.denoiser, self.count = denoiser, count
        self.modules = {name: denoiser.get_submodule(name) for name in names}
        self._timesteps: list[float] = []
        self._rows: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in names}
        self._calls: dict[str, tuple[list[int], list[int]]] = {name: ([], []) for name in names}

    def see(self, call: Any, generator: torch.Generator) -> None:
        """Run a call and keep a part of what the layers see."""
        self._timesteps.append(float(call.timestep.float().mean()))

        def observe(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer, x = self.modules[name], first_argument(name, args, kwargs)
            kind = kind_of(layer)
            assert kind is not None
            for part, values in enumerate(seen_and_held_out(x, batched=x.dim() > 1 + kind.spatial)):
                rows = input_rows(layer, values, self.count, generator)  # [P, R, K]
                self._rows[name][part].append(rows)
                self._calls[name][part].extend([len(self._timesteps) - 1] * rows.shape[1])

        with hooked(self.modules, before=observe, first=True):
            call.run(self.denoiser)

    def rows_of(self, name: str, groups: int) -> tuple[InputRows, InputRows]:
        """What was seen of a layer's input, in this many timestep groups: rows for ranges, and held out."""
        known = sorted(set(self._timesteps))
        by_call = uniform_groups(known, min(groups, len(known))).index(torch.tensor(self._timesteps))
        seen, held_out = (
            InputRows.of(self.modules[name], torch.cat(rows, 1), by_call[torch.tensor(calls)])
            for rows, calls in zip(self._rows[name], self._calls[name], strict=True)
        )
        return seen, held_out
