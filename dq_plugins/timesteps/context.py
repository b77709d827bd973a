"""What the layers of a denoiser know about the call that runs: its timestep, and the group it falls into.

Layers hold the small `TimestepContext`, not the denoiser, so ``copy.deepcopy`` and ``pickle`` of the denoiser carry a
context of their own, and two denoisers in one process never meet. A selection belongs to one call in one thread:
threads share a denoiser, a call within a call comes back to its own selection, and an exception leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from dq_plugins.errors import DQError, TimestepError
from dq_plugins.timesteps.finite import NonFinite
from dq_plugins.timesteps.groups import TimestepGroups
from dq_plugins.timesteps.recomputation import Running, remember
from dq_plugins.timesteps.selection import Selection, by_sample_or_token, fewest_entries

OutOfRange = Literal["error", "nearest"]

DIFFERENT_TIMESTEPS = (
    "the samples of this batch have different timesteps, and the denoiser was told that they never have; apply the "
    "plan with uniform_timesteps=False"
)


class TimestepContext:
    """The groups of one denoiser and, while it runs, the selected index of each.

    Args:
        groups: named sets of groups; layers select by name.
        out_of_range: what to do with a timestep outside the calibrated range: raise, or use the nearest group.
        uniform: every call has one timestep for the whole batch, as sampling has. A denoiser that takes one timestep
            per sample then selects one set of parameters in a compiled graph too, which is faster; a call with
            different timesteps is an error.
        non_finite: what NaN or infinity among the arguments of a call does, see `dq_plugins.timesteps.finite`.
    """

    def __init__(
        self,
        groups: Mapping[str, TimestepGroups],
        out_of_range: OutOfRange = "error",
        *,
        uniform: bool = False,
        non_finite: NonFinite = "nan",
    ) -> None:
        if out_of_range not in ("error", "nearest"):
            raise TimestepError(f"out_of_range is 'error' or 'nearest', got {out_of_range!r}")
        if non_finite not in ("nan", "error"):
            raise DQError(f"non_finite is 'nan' or 'error', got {non_finite!r}")
        self.groups = dict(groups)
        self.non_finite = non_finite
        self.out_of_range = out_of_range
        self.uniform = uniform
        self.running = Running()

    def select(self, timestep: Tensor | float, denoiser: nn.Module | None = None) -> Selecting:
        """Select the groups of a timestep while a ``with`` block is open: for layers called without their denoiser.

        Args:
            timestep: number, 0-d, ``[1]``, ``[B]``, ``[B, T]``, or of more dimensions whose sizes multiply to T.
            denoiser: whose call it is.

        Raises:
            TimestepError: not finite, or outside the calibrated range.

        Example:
            >>> context = TimestepContext({"all": TimestepGroups((500.0,))})
            >>> with context.select(700):
            ...     context.index("all")
            tensor([1])
        """
        return Selecting(self.running, self.selection_of(timestep, denoiser))

    def selection_of(self, timestep: Tensor | float, denoiser: nn.Module | None = None) -> Selection:
        """What a call at ``timestep`` selects; see `select`."""
        t = timestep if isinstance(timestep, Tensor) else torch.tensor([float(timestep)])
        t = by_sample_or_token(t)
        traced = torch.compiler.is_compiling()
        # On an accelerator reading a value would stall the device at every step, and in a compiled graph there is
        # none to read: only eager code on the host looks at the values.
        if t.device.type == "cpu" and not traced:
            self._check(t)
            t = fewest_entries(t)
        if self.uniform and t.numel() > 1:
            # checked by the device when it gets there: no stall, and it is part of a compiled graph
            t = t.reshape(-1)
            torch._assert_async((t == t[0]).all(), DIFFERENT_TIMESTEPS)
            t = t[:1]
        return Selection(t, {name: groups.index(t) for name, groups in self.groups.items()}, traced, {}, denoiser)

    def _check(self, t: Tensor) -> None:
        if self.out_of_range == "error":
            smallest, largest = (float(v) for v in t.double().aminmax())
            for groups in self.groups.values():
                groups.check(smallest, largest)

    @property
    def selection(self) -> Selection:
        """The selection of the call that runs, or of the one that is being computed again for its gradient.

        Raises:
            TimestepError: there is none.
        """
        selection = self.running.selection
        if selection is None:
            selection = self.running.recomputed
        if selection is None:
            raise TimestepError(
                "a layer that depends on the timestep was called outside the denoiser's forward, so no timestep is "
                "known. Call the denoiser itself, or select one: with context_of(denoiser).select(t): ..."
            )
        return selection

    def index(self, name: str) -> Tensor:
        """Selected group of the named groups: int64 ``[1]``, ``[B]`` or ``[B, T]``.

        Raises:
            TimestepError: no forward of the denoiser is running, or the name is unknown.
        """
        selection = self.running.selection  # not self.selection at once: this runs at every layer of every step
        found = (self.selection if selection is None else selection).index
        if name not in found:
            raise TimestepError(f"no timestep groups named {name!r}; there are: {', '.join(found)}")
        return found[name]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which no call is running in."""
        return {name: value for name, value in vars(self).items() if name != "running"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, running=Running())


class Selecting:
    """Makes a selection that of the running call, in this thread, while it is open; then the one before is back."""

    def __init__(self, running: Running, selection: Selection) -> None:
        self.running, self.chosen = running, selection
        self.before: Selection | None = None
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self.hooks = remember(running, selection) if differentiable else None

    def __enter__(self) -> Self:
        if self.hooks is not None:
            self.hooks.__enter__()
        self.before, self.running.selection = self.running.selection, self.chosen
        return self

    def __exit__(self, *error: object) -> None:
        self.running.selection = self.before
        if self.hooks is not None:
            self.hooks.__exit__(*error)
