"""Layers, and shapes of their inputs, for the tests of what inputs and weights go through."""

from __future__ import annotations

from torch import nn

LAYERS = {
    "linear": lambda: (nn.Linear(16, 6), (3, 5, 16)),
    "1x1": lambda: (nn.Conv2d(16, 6, 1), (2, 16, 4, 4)),
    "3x3": lambda: (nn.Conv2d(16, 6, 3, padding=1, stride=2), (2, 16, 5, 4)),
    "reflected": lambda: (nn.Conv2d(16, 6, 3, padding=1, padding_mode="reflect", bias=False), (2, 16, 5, 4)),
    "1d": lambda: (nn.Conv1d(16, 6, 3, padding="same"), (16, 9)),
}
