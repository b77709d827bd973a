"""BinaryDM's additions to a training loop that stays the user's: a loss term, a transition, an average.

Source: BinaryDM, equation 15 and section 4.1:

    L = L_simple + L_EBB + lambda L_LRM        tau = 9e-2 (in L_EBB), lambda = 1e-4
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dq_plugins.errors import DQError
from dq_plugins.passes.binarization.mimicking import LowRankMimicking
from dq_plugins.quantized.binarizers import evolution_penalty, evolvable_bases, evolve, fade, shrink


class BinaryDMCallback:
    """One object beside the training loop.

    Every option stands alone: without ``blocks`` no teacher is needed, without ``evolve_at`` both bases stay, without
    ``ema_decay`` nothing is averaged. Use the bare module here, and the wrapped one (DistributedDataParallel,
    ``accelerator.prepare``) in the loop.

    Args:
        student: the denoiser that trains, after `train_quantized` (or with Brevitas quantizers).
        teacher: the full-precision denoiser; needed where ``blocks`` are given. It is frozen.
        blocks: blocks to mimic, names in both models; see `BinaryDMChoices.blocks`.
        evolve_at: iteration after which the second bases are dropped; the paper takes half of all iterations.
        fade: over how many iterations before that the second bases count for less and less, linearly. The paper leaves
            their shrinking to the regulariser alone, which takes tens of thousands of iterations; in a shorter run
            they are dropped at almost full size, and the network starts over. None: as the paper.
        tau: weight of the regulariser in the loss; 0 leaves it out. None: a step of its own after the optimizer's, as
            strong as it has to be for the second scales to be gone at ``evolve_at`` (`shrink`): for runs of any length,
            where the paper's weight is for hundreds of thousands of iterations.
        mimic: lambda, weight of the mimicking loss.
        reduction: K, one over the share of directions that is mimicked.
        ema_decay: largest decay of the moving average, or None.

    Example:
        >>> import torch
        >>> from dq_plugins.passes.binarization import LayerChoice, train_quantized
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
        >>> student = train_quantized(model, {"0": LayerChoice("evolvable"), "2": LayerChoice("int8")})
        >>> optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        >>> binarydm = BinaryDMCallback(student, evolve_at=1)
        >>> for i in range(3):
        ...     loss = student(torch.randn(16, 4)).square().mean()
        ...     loss = binarydm.step(loss)               # added line
        ...     loss.backward(); optimizer.step(); optimizer.zero_grad()
        ...     binarydm.on_step(i)                      # added line
        >>> binarydm.evolved
        True
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        blocks: tuple[str, ...] = (),
        evolve_at: int | None = None,
        fade: int | None = None,
        tau: float | None = 9e-2,
        mimic: float = 1e-4,
        reduction: int = 4,
        ema_decay: float | None = None,
    ) -> None:
        if blocks and teacher is None:
            raise DQError("mimicking blocks needs the full-precision denoiser: pass it as teacher=...")
        if fade is not None and (evolve_at is None or not 1 <= fade <= evolve_at):
            raise DQError(
                f"fade={fade} iterations end where the second bases are dropped, so they need evolve_at of at least "
                f"as many; evolve_at={evolve_at}"
            )
        if tau is None and evolve_at is None:
            raise DQError("tau=None shrinks the second scales until they are dropped, so it needs evolve_at")
        self.student = student
        self.evolve_at, self.fade, self.tau, self.mimic = evolve_at, fade, tau, mimic
        self.parts: dict[str, Tensor] = {}
        self._ema_decay = ema_decay
        self.ema: AveragedModel | None = None
        self.mimicking: LowRankMimicking | None = None
        if blocks and teacher is not None:
            self.mimicking = LowRankMimicking(student, teacher, tuple(blocks), reduction)

    def step(self, loss: Tensor) -> Tensor:
        """Add the regulariser and the mimicking loss of the student's latest forward.

        Args:
            loss: the loop's own loss.

        Returns:
            The loss to propagate back. ``parts`` holds the added terms, for logging.
        """
        self.parts = {}
        if self.tau and evolvable_bases(self.student):
            self.parts["penalty"] = evolution_penalty(self.student, self.tau)
        if self.mimicking is not None:
            self.parts["mimicking"] = self.mimic * self.mimicking.loss()
        return torch.stack([loss, *self.parts.values()]).sum() if self.parts else loss

    def on_step(self, iteration: int) -> bool:
        """Call after ``optimizer.step()``: make the transition when its time has come, and average.

        Args:
            iteration: of the loop, from 0.

        Returns:
            Whether the second bases were dropped now.
        """
        evolved = self._advance(iteration)
        if self._ema_decay is not None:
            if self.ema is None:
                self.ema = moving_average(self.student, self._ema_decay)
            self.ema.update_parameters(self.student)  # after the transition, which is a buffer: averages follow it
        return evolved

    def _advance(self, iteration: int) -> bool:
        if self.evolve_at is None:
            return False
        left = self.evolve_at - iteration
        if left <= 0:
            return evolve(self.student) > 0
        if self.tau is None:
            shrink(self.student, left)
        if self.fade is not None and left < self.fade:
            fade(self.student, left / self.fade)
        return False

    @property
    def evolved(self) -> bool:
        """Whether no second basis is left."""
        return all(basis.evolved for basis in evolvable_bases(self.student))

    @property
    def averaged(self) -> nn.Module:
        """A copy of the student with averaged parameters, to sample with; the student where nothing is averaged."""
        return self.student if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the student's own state (which holds the stage)."""
        state = {f"ema/{k}": v for k, v in self.ema.state_dict().items()} if self.ema else {}
        if self.mimicking:
            state |= {f"directions/{k}": v for k, v in self.mimicking.directions.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        parts: dict[str, dict[str, Tensor]] = {"ema": {}, "directions": {}}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            parts[kind][name] = value
        if parts["ema"] and self._ema_decay is not None:
            self.ema = moving_average(self.student, self._ema_decay)
            self.ema.load_state_dict(parts["ema"])
        if self.mimicking is not None:
            device = next(self.student.parameters()).device
            self.mimicking.directions = {name: value.to(device) for name, value in parts["directions"].items()}

    def remove(self) -> None:
        """Unhook the student."""
        if self.mimicking is not None:
            self.mimicking.remove()


def moving_average(model: nn.Module, decay: float = 0.999) -> AveragedModel:
    """An averaged copy of a model, with the usual warm-up of the decay.

        average <- d average + (1 - d) parameter        d = min(decay, (1 + n) / (10 + n)) at update n = 2, 3, ...

    The first ``update_parameters(model)`` copies, and early averages forget the start. Buffers are those of the model
    at the latest update.

    Args:
        model: whose parameters are averaged.
        decay: largest decay.
    """

    def update(averages: list[Tensor], parameters: list[Tensor], updates: Tensor) -> None:
        step = int(updates) + 1
        get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(averages, parameters, updates)

    return AveragedModel(model, multi_avg_fn=update)
