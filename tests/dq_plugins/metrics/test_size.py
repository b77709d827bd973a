import torch
from torch import nn

from dq_plugins.metrics.size import state_bytes


def test_counts_parameters_and_buffers_once() -> None:
    net = nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5, affine=False))
    net.append(net[0])
    assert state_bytes(net) == 4 * 15 + 4 * 10 + 8
    net[0].to(torch.float16)
    assert state_bytes(net) == 2 * 15 + 4 * 10 + 8
