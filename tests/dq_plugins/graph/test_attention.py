from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dq_plugins.graph import partition


class Cross(nn.Module):
    """Cross-attention with ``q``, ``k``, ``v`` named for the test to compare; subclasses write the products."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x, t, words, mask):
        return x * t[:, None, None] + self.attend(self.q(x), self.k(words), self.v(words), mask)


class Fused(Cross):
    def attend(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


class Products(Cross):
    def attend(self, q, k, v, mask):
        scores = q @ k.transpose(1, 2) / math.sqrt(4) + mask[:, None]
        return F.dropout(scores.float().softmax(-1), 0.1, self.training).to(v.dtype) @ v


class Added(Cross):
    def attend(self, q, k, v, mask):
        scores = torch.baddbmm(mask[:, None].expand(-1, 3, -1), q, k.transpose(1, 2), beta=1, alpha=0.5)
        return torch.bmm(scores.softmax(-1), v)


class Einsum(Cross):
    def attend(self, q, k, v, mask):
        scores = torch.einsum("bkc,bqc->bqk", k, q)  # the key is the first factor
        return torch.einsum("bqk,bkc->bqc", scores.softmax(2), v)


class Transposed(Cross):
    def attend(self, q, k, v, mask):
        scores = k @ q.transpose(1, 2)  # [B, keys, queries]: the softmax runs over the rows
        return scores.softmax(-2).transpose(1, 2) @ v


class Joined(Cross):
    """Keys and values of the text joined to those of the sample, as in joint attention with a fixed text."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(4, 8)

    def attend(self, q, k, v, mask):
        own_k, own_v = self.own(q).chunk(2, -1)
        k, v = torch.cat([own_k, k], 1), torch.cat([own_v, v], 1)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


@pytest.mark.parametrize("model", [Fused, Products, Added, Einsum, Transposed, Joined])
def test_key_and_value_are_found_however_the_attention_is_written(model):
    inputs = {
        "x": torch.randn(2, 3, 4), "t": torch.rand(2), "words": torch.randn(2, 5, 6), "mask": torch.zeros(2, 5),
    }  # fmt: skip
    part = partition(model(), inputs)
    assert part.with_role("cross_attention_key") == ("k",)
    assert part.with_role("cross_attention_value") == ("v",)


class Gated(Cross):
    """A softmax of a layer's output is a gate: the product further back has nothing to do with it."""

    def attend(self, q, k, v, mask):
        h = q @ q.transpose(1, 2) @ q
        gate = self.q(h).softmax(-1)
        return (gate @ k.transpose(1, 2)).mean(-1, keepdim=True) * h + v.mean()


def test_a_gate_is_no_attention():
    inputs = {
        "x": torch.randn(2, 3, 4), "t": torch.rand(2), "words": torch.randn(2, 5, 6), "mask": torch.zeros(2, 5),
    }  # fmt: skip
    part = partition(Gated(), inputs)
    assert not part.with_role("cross_attention_key")
    assert not part.with_role("cross_attention_value")


class TextOnly(Cross):
    def forward(self, x, t, words, mask):
        text = F.scaled_dot_product_attention(self.k(words)[:, None], self.k(words)[:, None], self.v(words)[:, None])
        return self.q(x) * t[:, None, None] + text[:, 0, :3]


def test_attention_among_conditions_alone_is_not_cross_attention():
    inputs = {
        "x": torch.randn(2, 3, 4), "t": torch.rand(2), "words": torch.randn(2, 5, 6), "mask": torch.zeros(2, 5),
    }  # fmt: skip
    part = partition(TextOnly(), inputs)
    assert part.condition == {"k", "v"}
    assert not part.with_role("cross_attention_key")
