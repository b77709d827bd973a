from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from odd_denoisers import Obelisk, Quarry, TwoLayers
from torch import nn

from dq_plugins.graph import partition


@pytest.fixture(scope="module")
def roles() -> dict[str, frozenset[str]]:
    return partition(Quarry(), Quarry.inputs()).roles


def with_role(roles: dict[str, frozenset[str]], role: str) -> set[str]:
    return {name for name, found in roles.items() if role in found}


@pytest.mark.parametrize(
    ("role", "layers"),
    [
        ("first", {"a"}),
        ("last", {"z"}),
        ("shortcut", {"d.r", "f.r"}),
        ("downsample", {"c"}),
        ("upsample", {"u"}),
        ("cross_attention_key", {"m.index"}),
        ("cross_attention_value", {"m.content"}),
        ("temporal", {"alpha.0", "alpha.2", "b.film", "d.film", "f.film"}),
        ("temporal_first", {"alpha.0"}),
        ("condition", {"m.index", "m.content"}),
        ("mixed", set()),
    ],
)
def test_roles_of_a_unet_with_odd_names(roles, role, layers):
    assert with_role(roles, role) == layers


def test_roles_of_a_transformer():
    roles = partition(Obelisk(), Obelisk.inputs()).roles
    assert with_role(roles, "first") == {"enter"}
    assert with_role(roles, "last") == {"leave"}
    assert with_role(roles, "constant") == {"place"}
    assert not with_role(roles, "shortcut")
    assert not with_role(roles, "cross_attention_key")


class Residuals(TwoLayers):
    """Linear layers around residual additions: one shortcut, and three that only look like one."""

    def __init__(self):
        super().__init__()
        self.bypass, self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.left, self.right, self.plain = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, t):
        x = self.body(x) + self.time(t)
        x = self.bypass(F.layer_norm(x, (4,))) / 2.0 + self.two(F.silu(self.one(x)))
        x = self.left(x) + self.right(x)  # two equal branches: neither bypasses the other
        return x + self.plain(x)  # the identity bypasses the layer


def test_a_shortcut_bypasses_at_least_two_layers():
    assert with_role(partition(Residuals(), TwoLayers.inputs()).roles, "shortcut") == {"bypass"}


class Convolutions(TwoLayers):
    """A patch embedding, and two bypasses: of one wide convolution, and of two pointwise ones."""

    def __init__(self):
        super().__init__()
        self.patch, self.unpatch = nn.Conv2d(1, 4, 2, stride=2), nn.ConvTranspose2d(4, 1, 2, stride=2)
        self.bypass, self.wide = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.branch, self.deep, self.join = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x, t):
        h = self.patch(x[:, None]) + self.time(t)[:, :, None, None]
        h = self.bypass(h) + self.wide(h)
        h = self.branch(h) + self.join(torch.cat([h, self.deep(h).relu()], 1))
        return self.unpatch(h)[:, 0]


def test_roles_of_convolutions():
    inputs = {"x": torch.randn(2, 8, 8), "t": torch.randn(2, 4)}
    roles = partition(Convolutions(), inputs).roles
    assert with_role(roles, "first") == {"patch"}
    assert not with_role(roles, "downsample")  # the patch embedding is the first layer
    assert with_role(roles, "upsample") == {"unpatch"}
    assert with_role(roles, "shortcut") == {"bypass", "branch"}


class Joins(TwoLayers):
    """A branch beside one layer, which also takes something deeper from elsewhere: it bypasses one layer only."""

    def __init__(self):
        super().__init__()
        self.branch, self.join = nn.Linear(4, 4), nn.Linear(8, 4)
        self.deep = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x, t):
        h = self.body(x) + self.time(t)
        return self.branch(h) + self.join(torch.cat([h, self.deep(x)], 1))


def test_a_branch_beside_one_layer_is_no_shortcut():
    assert not with_role(partition(Joins(), TwoLayers.inputs()).roles, "shortcut")


class Heads(TwoLayers):
    """A second output and a layer that reaches none."""

    def __init__(self):
        super().__init__()
        self.other, self.dead = nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x, t):
        h = self.body(x) + self.time(t)
        self.dead(h)
        return h, self.other(h.detach())


def test_layers_that_reach_no_output_are_neither_first_nor_last():
    roles = partition(Heads(), TwoLayers.inputs()).roles
    assert with_role(roles, "first") == {"body"}
    assert with_role(roles, "last") == {"other"}
