from __future__ import annotations

import pytest
import torch
from torch import nn

from dq_plugins.errors import DQError
from dq_plugins.passes.binarization.mimicking import (
    LowRankMimicking,
    by_channel,
    mimicking_loss,
    principal_directions,
)


def planted_features(shape, strong, seed=0):
    """Features whose variance lies in known channel directions; returns them and those directions."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1] if len(shape) == 4 else shape[-1]
    basis, _ = torch.linalg.qr(torch.randn(channels, channels, generator=generator))
    n = torch.tensor(shape).prod().item() // channels
    strength = torch.full((channels,), 0.01)
    strength[:strong] = torch.linspace(3, 2, strong)
    x = torch.randn(n, channels, generator=generator) * strength @ basis.t() + 5
    x = x.reshape(shape[0], *shape[2:], channels).movedim(-1, 1) if len(shape) == 4 else x.reshape(shape)
    return x, basis[:, :strong]


@pytest.mark.parametrize("shape", [(4, 16, 12, 12), (4, 200, 16)])
def test_directions_find_the_planted_subspace_of_the_channels(shape):
    features, planted = planted_features(shape, strong=4)
    directions = principal_directions(features, reduction=4)
    assert directions.shape == (16, 4)
    torch.testing.assert_close(directions.t() @ directions, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(directions @ directions.t(), planted @ planted.t(), atol=1e-3, rtol=0)


def test_directions_come_in_order_of_variance():
    features, _ = planted_features((2000, 8), strong=8)
    directions = principal_directions(features[None], reduction=1)
    variance = (by_channel(features[None]) @ directions).var(0)
    assert (variance.diff() < 0).all()


@pytest.mark.parametrize(("channels", "expected"), [(64, 16), (6, 2), (1, 1)])
def test_rank(channels, expected):
    assert principal_directions(torch.randn(1, 70, channels), reduction=4).shape == (channels, expected)


def test_a_student_that_differs_outside_the_subspace_only_has_no_loss_and_no_gradient():
    teacher, _ = planted_features((4, 16, 6, 6), strong=4)
    directions = principal_directions(teacher)
    outside = torch.eye(16) - directions @ directions.t()
    noise = torch.randn(4 * 36, 16) @ outside
    student = (teacher + noise.reshape(4, 6, 6, 16).movedim(-1, 1)).requires_grad_(True)
    loss = mimicking_loss(teacher, student, directions)
    loss.backward()
    assert float(loss.detach()) < 1e-10
    assert student.grad.abs().max() < 1e-7


def test_gradients_lie_in_the_subspace():
    teacher, _ = planted_features((4, 16, 6, 6), strong=4)
    directions = principal_directions(teacher)
    student = torch.randn(4, 16, 6, 6, requires_grad=True)
    mimicking_loss(teacher, student, directions).backward()
    gradient = by_channel(student.grad)
    assert gradient.norm() > 1e-3
    torch.testing.assert_close(gradient @ directions @ directions.t(), gradient, atol=1e-8, rtol=1e-4)


def test_directions_are_frozen_after_the_first_batch():
    student, teacher = (nn.Sequential(nn.Identity()) for _ in range(2))
    mimicking = LowRankMimicking(student, teacher, ("0",))
    kept = []
    for seed in (0, 9):
        student(planted_features((2, 16, 4, 4), strong=4, seed=seed)[0])
        mimicking.loss()
        kept.append(mimicking.directions["0"].clone())
    assert torch.equal(*kept)


def train_student(mimic, steps=120):
    """Learn a wide teacher's output through a binary-like bottleneck; how far are the block's features after?"""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    student = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    mimicking = LowRankMimicking(student, teacher, ("0",), reduction=2)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    x = torch.randn(128, 8)
    for _ in range(steps):
        with torch.no_grad():
            target = teacher(x)
        loss = (student(x) - target).square().mean()
        mimicry = mimicking.loss()
        optimizer.zero_grad()
        (loss + mimic * mimicry).backward()
        optimizer.step()
    return float(mimicry.detach())


def test_mimicking_brings_the_features_closer_than_the_output_loss_alone():
    assert train_student(mimic=1.0) < 0.2 * train_student(mimic=0.0)


class OneOfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def test_unknown_blocks_and_blocks_that_did_not_run_are_named():
    student, teacher = OneOfTwo(), OneOfTwo()
    with pytest.raises(DQError, match="no block 'x'"):
        LowRankMimicking(student, teacher, ("x",))
    mimicking = LowRankMimicking(student, teacher, ("unused",))
    student(torch.ones(1, 2))
    with pytest.raises(DQError, match="'unused' did not run"):
        mimicking.loss()
