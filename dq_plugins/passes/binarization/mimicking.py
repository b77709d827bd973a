"""Low-rank representation mimicking: the student follows the teacher's blocks where the teacher's features live.

Source: BinaryDM, section 3.3. For block ``i`` with features ``e`` of ``c`` channels, ``P`` holds the first
``round(c / K)`` principal directions of the teacher's features over channels; samples and positions are observations:

    L_LRM = mean_i mean_elements ( P^T e_teacher - P^T e_student )^2          K = 4

The directions come from the first batch and stay. Following only them leaves the student free where the teacher has
little to say, and a full-rank target would drown a binary network in detail it cannot hold.

Shapes: features ``[B, C, ...]`` (convolutional, 3 or more dimensions after a batch of images or signals) or
``[B, N, C]`` (tokens); directions ``[C, r]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.calibration import first_tensor
from dq_plugins.errors import DQError
from dq_plugins.hooks import hooked
from dq_plugins.quantized.learned_step import mean_over_processes


def by_channel(features: Tensor) -> Tensor:
    """Observations by channels, float32 ``[n, C]``: the channel axis is 1 for images, the last one for tokens."""
    if features.dim() >= 4:
        features = features.movedim(1, -1)
    return features.reshape(-1, features.shape[-1]).float()


def principal_directions(features: Tensor, reduction: int = 4) -> Tensor:
    """Orthonormal directions of largest variance over channels, in order: float32 ``[C, r]``.

    In a distributed run the moments of all processes are averaged first, so every process gets the same directions.

    Args:
        features: ``[B, C, ...]`` or ``[B, N, C]``.
        reduction: K of the paper.
    """
    x = by_channel(features.detach()).double()
    moments = torch.cat([x.mean(0, keepdim=True), x.t() @ x / len(x)])  # [1 + C, C]
    moments = mean_over_processes(moments)
    covariance = moments[1:] - moments[0].outer(moments[0])
    _, vectors = torch.linalg.eigh(covariance)  # ascending
    rank = max(1, round(x.shape[1] / reduction))
    return vectors.flip(1)[:, :rank].float().contiguous()


def mimicking_loss(teacher: Tensor, student: Tensor, directions: Tensor) -> Tensor:
    """Mean squared difference of the features along the directions."""
    return ((by_channel(student) - by_channel(teacher)) @ directions).square().mean()


class LowRankMimicking:
    """The mimicking loss over the blocks of a student in training; its directions are set by the first batch.

    Sampling with the student (without gradients) and calls of its copies do not interfere.

    Args:
        student: the denoiser that trains.
        teacher: the full-precision denoiser; frozen here.
        blocks: fully qualified names, in both models.
        reduction: K of the paper; 1 keeps every direction.

    Attributes:
        directions: per block ``[C, r]``; empty before the first batch.

    Raises:
        DQError: a model has no such block.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, blocks: tuple[str, ...], reduction: int = 4) -> None:
        self.student, self.teacher = student, teacher.requires_grad_(False).eval()
        self.reduction = reduction
        self.directions: dict[str, Tensor] = {}
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._features: dict[str, Tensor] = {}
        self._blocks = _modules(teacher, blocks)
        self._handles = [
            student.register_forward_pre_hook(self._remember_call(), with_kwargs=True),
            *(m.register_forward_hook(self._keep_features(n, m)) for n, m in _modules(student, blocks).items()),
        ]

    # Closures and not methods: a deep copy of the student copies the objects of its hooks, but not their closures.
    def _remember_call(self) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled() and module is self.student:
                self._call = args, kwargs

        return remember

    def _keep_features(self, name: str, block: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if torch.is_grad_enabled() and module is block:
                self._features[name] = first_tensor(output)

        return keep

    def loss(self) -> Tensor:
        """Mean over the blocks of `mimicking_loss` for the student's latest call, not yet multiplied by lambda.

        Raises:
            DQError: the student, or one of its blocks, has not run since the last time.
        """
        if self._call is None:
            raise DQError("step(loss) comes after the student's forward; it has not run since the last step")
        (args, kwargs), student, teacher = self._call, self._features, {}
        self._call, self._features = None, {}
        with torch.no_grad(), hooked(self._blocks, after=lambda n, a, k, out: teacher.update({n: first_tensor(out)})):
            self.teacher(*args, **kwargs)
        missing = [name for name in self._blocks if name not in student or name not in teacher]
        if missing:
            raise DQError(f"block {missing[0]!r} did not run, so its features cannot be compared")
        for name in self._blocks:
            if name not in self.directions:
                self.directions[name] = principal_directions(teacher[name], self.reduction)
        return torch.stack([mimicking_loss(teacher[n], student[n], self.directions[n]) for n in self._blocks]).mean()

    def remove(self) -> None:
        """Unhook the student."""
        for handle in self._handles:
            handle.remove()


def _modules(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise DQError(f"{type(model).__name__} has no block {unknown[0]!r}, so its features cannot be compared")
    return {name: modules[name] for name in names}
