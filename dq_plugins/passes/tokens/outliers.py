"""Finding outlier tokens in the inputs of cross-attention keys and values, by what they hold and never by name.

CLIP's text encoder is causal, so its first token sees no other: its embedding is the same for every prompt, and its
largest value is 50 to 80 times that of other tokens. Other encoders have no such token, or others. A position is an
outlier when

- most samples hold the same vector there, bit for bit, and
- the largest value of that vector is at least ``ratio`` times the median of the largest values at all other positions.

Source: MixDQ (Zhao et al. 2024), section 3.2.

Shapes: ``N`` samples, ``L`` tokens, ``D`` features.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dq_plugins.hashing import hash_tensor

RATIO = 4.0
"""Least ratio to the other tokens: below it, a bit or two of range are at stake."""

SHARE = 0.5
"""Least share of samples that hold the same vector."""


class TokenVector(NamedTuple):
    """What most samples hold at one position.

    Attributes:
        position: of the token.
        vector: ``[D]``.
        share: of the samples that hold it.
        ratio: its largest value over the median of the other tokens' largest values.
    """

    position: int
    vector: Tensor
    share: float
    ratio: float


@dataclass
class TokenStatistics:
    """What is known about the tokens of one layer's input; keeps hashes of what it saw, and one vector a position.

    Attributes:
        samples: samples seen.
        length: tokens; None before the first sample.
        usable: False once an input was not a sequence, or a sequence of another length.
    """

    samples: int = 0
    length: int | None = None
    usable: bool = True
    _largest: Tensor | None = None
    _seen: list[Counter[str]] = field(default_factory=list)
    _vectors: dict[int, tuple[str, Tensor]] = field(default_factory=dict)

    def update(self, x: Tensor) -> None:
        """See an input ``[N, L, D]``; inputs of another rank, or of another length than before, make it unusable."""
        if x.dim() != 3 or x.shape[1] < 2 or self.length not in (None, x.shape[1]):
            self.usable = False
            return
        if self.length is None:
            self.length, self._seen = x.shape[1], [Counter() for _ in range(x.shape[1])]
            self._largest = torch.zeros(x.shape[1])
        assert self._largest is not None
        largest = x.detach().float().abs().amax(2).cpu()  # [N, L]
        self._largest = torch.maximum(self._largest, largest.amax(0))
        middle = largest.median(1, keepdim=True).values
        for sample, position in (largest >= middle).nonzero().tolist():  # an outlier is never below the median
            vector = x[sample, position].detach().cpu()
            key = hash_tensor(vector)
            self._seen[position][key] += 1
            if self._seen[position].most_common(1)[0][0] == key:
                self._vectors[position] = (key, vector.clone())
        self.samples += x.shape[0]

    def candidates(self) -> list[TokenVector]:
        """Most frequent vector of every position that has one."""
        if not self.usable or self._largest is None:
            return []
        found = []
        for position, (key, vector) in sorted(self._vectors.items()):
            others = torch.cat([self._largest[:position], self._largest[position + 1 :]])
            ratio = float(vector.float().abs().max() / others.median().clamp(min=1e-30))
            found.append(TokenVector(position, vector, self._seen[position][key] / self.samples, ratio))
        return found


def find_outliers(statistics: TokenStatistics, ratio: float = RATIO, share: float = SHARE) -> list[TokenVector]:
    """The outlier tokens that statistics show, by position; none where every token would be one.

    Args:
        statistics: of one layer's input.
        ratio: see the rule at the top of this file.
        share: see the rule at the top of this file.
    """
    found = [token for token in statistics.candidates() if token.share >= share and token.ratio >= ratio]
    return [] if len(found) == statistics.length else found
