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

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.errors import DQError
from dq_plugins.quantized.learned_step import mean_over_processes


def by_channel(features: Tensor) -> Tensor:
    """Observations by channels, float32 ``[n, C]``: the channel axis is 1 for images, the last one for tokens."""
    if features.dim() >= 4:
        features = features.movedim(1, -1)
    return features.reshape(-1, features.shape[-1]).float()


def rank_of(channels: int, reduction: int) -> int:
    """Number of directions kept: ``round(channels / reduction)``, at least one."""
    return max(1, round(channels / reduction))


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
    return vectors.flip(1)[:, : rank_of(x.shape[1], reduction)].float().contiguous()


def mimicking_loss(teacher: Tensor, student: Tensor, directions: Tensor) -> Tensor:
    """Mean squared difference of the features along the directions."""
    return ((by_channel(student) - by_channel(teacher)) @ directions).square().mean()


def first_tensor(output: Any) -> Tensor:
    """The features in a block's output: the tensor itself, or the first one of a tuple or mapping."""
    while not isinstance(output, Tensor):
        values = list(output.values()) if isinstance(output, Mapping) else list(output)
        if not values:
            raise DQError("a block returned nothing whose features could be compared")
        output = values[0]
    return output


class FeatureTap:
    """Keeps the latest output of named modules of one model.

    Args:
        model: a denoiser.
        names: fully qualified names of its blocks.
        training: keep outputs with gradients only, so that sampling in between does not interfere.

    Raises:
        DQError: a name is unknown.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...], *, training: bool = False) -> None:
        modules = dict(model.named_modules())
        unknown = [name for name in names if name not in modules]
        if unknown:
            raise DQError(f"{type(model).__name__} has no block {unknown[0]!r}, so its features cannot be compared")
        self.names, self.training = names, training
        self.features: dict[str, Tensor] = {}
        self._handles = [modules[name].register_forward_hook(self._keeper(name, modules[name])) for name in names]

    def _keeper(self, name: str, block: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            # a deep copy of the model brings this hook along, and its features are not wanted
            if module is block and (torch.is_grad_enabled() or not self.training):
                self.features[name] = first_tensor(output)

        return keep

    def take(self) -> dict[str, Tensor]:
        """The features since the last call, and forget them."""
        missing = [name for name in self.names if name not in self.features]
        if missing:
            raise DQError(f"block {missing[0]!r} has not run since its features were last taken")
        features, self.features = self.features, {}
        return features

    def remove(self) -> None:
        """Unhook."""
        for handle in self._handles:
            handle.remove()


class LowRankMimicking:
    """The mimicking loss over the blocks of a denoiser; its directions are set by the first batch.

    Args:
        blocks: fully qualified names.
        reduction: K of the paper; 1 keeps every direction.

    Attributes:
        directions: per block ``[C, r]``; empty before the first batch.
    """

    def __init__(self, blocks: tuple[str, ...], reduction: int = 4) -> None:
        if not blocks:
            raise DQError("mimicking needs at least one block; name some with blocks=(...)")
        self.blocks, self.reduction = blocks, reduction
        self.directions: dict[str, Tensor] = {}

    def __call__(self, teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> Tensor:
        """Mean over the blocks of `mimicking_loss`, not yet multiplied by lambda."""
        for name in self.blocks:
            if name not in self.directions:
                self.directions[name] = principal_directions(teacher[name], self.reduction)
        losses = [mimicking_loss(teacher[n].detach(), student[n], self.directions[n]) for n in self.blocks]
        return torch.stack(losses).mean()

    def state_dict(self) -> dict[str, Tensor]:
        """The directions, by block."""
        return dict(self.directions)

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Take directions over, for example from a checkpoint."""
        self.directions = {name: directions.to(device) for name, directions in state.items()}
