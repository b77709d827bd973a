from __future__ import annotations

import pytest
import torch
from odd_denoisers import Obelisk, Quarry
from torch import Tensor, nn

from dq_plugins.graph import partition


class Block(nn.Module):
    """Residual block over ``[N, 8, ...]`` whose last layer sees the channels elsewhere than they leave."""

    def __init__(self, into, back) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 12), nn.Linear(12, 8)
        self.into, self.back = into, back

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(self.two(self.one(self.into(x)).relu()), x)


class Denoiser(nn.Module):
    def __init__(self, convolution: type[nn.Module], block: nn.Module) -> None:
        super().__init__()
        self.enter, self.block, self.leave = convolution(3, 8, 1), block, convolution(8, 3, 1)
        self.time = nn.Linear(1, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.enter(x)
        return self.leave(self.block(h + self.time(t[:, None]).reshape(-1, 8, *[1] * (h.dim() - 2))))


@pytest.mark.parametrize(
    ("into", "back"),
    [
        (lambda x: x.flatten(2).transpose(1, 2), lambda y, x: y.transpose(1, 2).reshape(x.shape)),
        (lambda x: x.movedim(1, -1), lambda y, x: y.movedim(-1, 1)),
        (lambda x: x.permute(0, 2, 3, 1).flatten(1, 2), lambda y, x: y.mT.contiguous().view(x.shape)),
        (lambda x: x.swapaxes(1, -1), lambda y, x: y.swapdims(-1, 1).contiguous()),
    ],
)
def test_a_block_over_maps_keeps_the_axis_of_maps_though_its_last_layer_is_linear(into, back):
    part = partition(Denoiser(nn.Conv2d, Block(into, back)), {"x": torch.zeros(2, 3, 4, 5), "t": torch.zeros(2)})
    assert part.layers["block.two"].block == "block"
    assert part.channel_axes["block.two"] == -1
    assert part.channel_axes["block"] == -3


def test_a_block_of_1d_convolutions_is_not_taken_for_tokens():
    block = Block(lambda x: x, lambda y, x: y)
    block.one, block.two = nn.Conv1d(8, 12, 1), nn.Conv1d(12, 8, 3, padding=1)
    part = partition(Denoiser(nn.Conv1d, block), {"x": torch.zeros(2, 3, 9), "t": torch.zeros(2)})
    assert (part.channel_axes["block"], part.channel_axes["enter"], part.channel_axes["time"]) == (-2, -2, -1)


def test_every_layer_and_every_block_has_one():
    for denoiser in (Quarry, Obelisk):
        part = partition(denoiser(), denoiser.inputs())
        blocks = {layer.block for layer in part.layers.values()} - {""}
        assert set(part.channel_axes) == {*part.layers, *blocks}
    assert all(part.channel_axes[block] == -1 for block in blocks)
