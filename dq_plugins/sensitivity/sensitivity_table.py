"""The measured sensitivities: one number for every layer, operand and width, and how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import numpy as np
from scipy.stats import spearmanr

from dq_plugins.errors import DQError
from dq_plugins.plan import EstimateCheck, MeasuredImageError, MeasuredSensitivity
from dq_plugins.quantized.attention import attending_module
from dq_plugins.quantized.candidates import Candidates, Entry, Operand
from dq_plugins.sensitivity.drift import ImageError
from dq_plugins.sensitivity.measure import FORWARD, Sums

Group = Literal["content", "quality"]
V = TypeVar("V")


@dataclass(frozen=True)
class SensitivityTable:
    """Sensitivities by entry.

    Attributes:
        noise: noise power of the denoiser's output relative to its signal (lower is better).
        structure: loss of similarity of the final samples by moved local means; empty when content was not measured.
        texture: loss of similarity within windows. ``structure + texture`` estimates ``1 - SSIM``.
        check: how the noise compares with exact measurements; None when it is exact.
        calls: what the measurement cost, in denoiser calls (a backward pass counts two).
        naive_calls: what repeating every call and every run for each entry would have cost.
        image: what entries do to the final image; None when it was not measured.
        image_check: how it compares with exact measurements; None when none was made.
    """

    noise: Mapping[Entry, float]
    structure: Mapping[Entry, float] = field(default_factory=dict)
    texture: Mapping[Entry, float] = field(default_factory=dict)
    check: EstimateCheck | None = None
    calls: float = 0.0
    naive_calls: float = 0.0
    image: ImageError | None = None
    image_check: EstimateCheck | None = None

    def sqnr(self, entry: Entry) -> float:
        """Signal-to-quantization-noise ratio of the output with only this entry quantized, in dB."""
        noise = self.noise[entry]
        return -10 * math.log10(noise) if noise > 0 else math.inf

    def similarity(self, entry: Entry) -> float:
        """Similarity (SSIM) of the final samples with only this entry quantized."""
        if entry not in self.structure:
            raise DQError(
                f"content was not measured for {entry}: run the pass 'sensitivity' with content=True, which the "
                "objective 'mixdq' needs"
            )
        return 1 - self.structure[entry] - self.texture[entry]

    def metric_kinds(
        self, rule: Literal["measured", "paper"] = "measured", *, paper: Iterable[str] = ()
    ) -> dict[str, Group]:
        """Content and quality layers; attentions are neither.

        Args:
            rule: ``"measured"``: content layers are those whose share of structure in the loss of similarity is above
                the median layer's. ``"paper"``: the layers in ``paper``.
            paper: content layers by MixDQ's rule (cross-attention and feed-forward layers).

        Returns:
            Group by layer.
        """
        layers = dict.fromkeys(entry.layer for entry in self.noise if attending_module(entry.layer) is None)
        if rule == "paper":
            content = set(paper)
            return {layer: "content" if layer in content else "quality" for layer in layers}
        shares = self.structure_shares()
        middle = float(np.median([shares[layer] for layer in layers]))
        return {layer: "content" if shares[layer] > middle else "quality" for layer in layers}

    def structure_shares(self) -> dict[str, float]:
        """Share of structure in each layer's loss of similarity, mean over its entries (each counts alike)."""
        if not self.structure:
            self.similarity(next(iter(self.noise)))  # raises: content was not measured
        shares: dict[str, list[float]] = {}
        for entry, structure in self.structure.items():
            total = structure + self.texture[entry]
            shares.setdefault(entry.layer, []).append(structure / total if total > 0 else 0.0)
        return {layer: sum(values) / len(values) for layer, values in shares.items()}

    def corrected(self, exact: Mapping[Entry, float], calls: float) -> SensitivityTable:
        """The table corrected by exact measurements of some entries.

        Estimates of one operand and width are multiplied by the geometric mean of exact / estimate there (of all
        operands and widths, where none was measured); measured entries take their exact relative noise power.
        ``calls`` is what that measurement cost.
        """
        logs: dict[str, list[float]] = {}
        usable = [e for e in exact if exact[e] > 0 and self.noise[e] > 0]
        for entry in usable:
            logs.setdefault(_stratum(entry), []).append(math.log(exact[entry] / self.noise[entry]))
        ratio = {key: math.exp(sum(values) / len(values)) for key, values in sorted(logs.items())}
        everywhere = math.exp(sum(map(sum, logs.values())) / len(usable)) if usable else 1.0
        noise = {e: v * ratio.get(_stratum(e), everywhere) for e, v in self.noise.items()}
        check = _checked(self.noise, exact, ratio, [math.log(exact[e] / noise[e]) for e in usable])
        return replace(self, noise={**noise, **exact}, check=check, calls=self.calls + calls)

    def with_image(self, image: ImageError, exact: Mapping[Entry, float], calls: float) -> SensitivityTable:
        """The table with what entries do to the final image, of which some were measured exactly.

        Those take their exact mean square error, drift and the rest alike; the others stay as they were estimated.
        ``calls`` is what both measurements cost.
        """
        alone = image.alone()
        factors = {e: exact[e] / alone[e] if e in exact and alone[e] > 0 else 1.0 for e in alone}
        logs: dict[str, list[float]] = {}
        for entry in exact:
            if factors[entry] > 0:
                logs.setdefault(_stratum(entry), []).append(math.log(factors[entry]))
        ratio = {key: math.exp(sum(values) / len(values)) for key, values in sorted(logs.items())}
        check = _checked(alone, exact, ratio, [v for values in logs.values() for v in values]) if exact else None
        return replace(self, image=image.scaled(factors), image_check=check, calls=self.calls + calls)

    @property
    def errors(self) -> Mapping[Entry, float]:
        """One number for every entry, for programs that add them up: mean square error of the final image, or noise."""
        return self.noise if self.image is None else self.image.alone()

    def measured(self, weight_choices: tuple[int, ...], act_choices: tuple[int, ...]) -> MeasuredSensitivity:
        """The table as a plan holds it.

        Args:
            weight_choices: widths of weights that were measured.
            act_choices: widths of inputs.
        """
        image = None
        if self.image is not None:
            image = MeasuredImageError(_nested(self.image.random), _nested(self.image.drift), self.image_check)
        noise, structure, texture = (_nested(part) for part in (self.noise, self.structure, self.texture))
        return MeasuredSensitivity(
            weight_choices, act_choices, noise, structure, texture, self.check, self.calls, self.naive_calls, image
        )

    @classmethod
    def of(cls, measured: MeasuredSensitivity) -> SensitivityTable:
        """The table that `measured` gave."""
        noise, structure, texture = (_flat(part) for part in (measured.noise, measured.structure, measured.texture))
        found, image, check = measured.image, None, None
        if found is not None:
            image, check = ImageError(_flat(found.random), _flat(found.drift)), found.check
        return cls(noise, structure, texture, measured.check, measured.calls, measured.naive_calls, image, check)


def _rank_correlation(estimates: list[float], exact: list[float]) -> float | None:
    found = float(spearmanr(estimates, exact).statistic)
    return found if math.isfinite(found) else None


def _stratum(entry: Entry) -> str:
    kind = entry.operand if attending_module(entry.layer) is None else "attention"
    return f"{kind}@{entry.bits}"


def _checked(
    estimates: Mapping[Entry, float], exact: Mapping[Entry, float], ratio: Mapping[str, float], left: list[float]
) -> EstimateCheck:
    """How estimates compare with exact measurements; ``left``: logarithms of exact / estimate not explained."""
    return EstimateCheck(
        entries=len(exact),
        rank_correlation=_rank_correlation([estimates[e] for e in exact], list(exact.values())),
        typical_ratio=ratio,
        spread=math.exp(math.sqrt(sum(v * v for v in left) / len(left))) if left else 1.0,
    )


def _nested(values: Mapping[Entry, V]) -> dict[str, dict[Operand, dict[int, V]]]:
    nested: dict[str, dict[Operand, dict[int, V]]] = {}
    for (layer, operand, bits), value in values.items():
        nested.setdefault(layer, {}).setdefault(operand, {})[bits] = value
    return nested


def _flat(nested: Mapping[str, Mapping[Operand, Mapping[int, V]]]) -> dict[Entry, V]:
    return {
        Entry(layer, operand, bits): value
        for layer, operands in nested.items()
        for operand, widths in operands.items()
        for bits, value in widths.items()
    }


def relative(results: Mapping[str, Sums], candidates: Candidates, suffix: str = "") -> dict[Entry, float]:
    """Sums over all units, relative to the signal of the units that hold the entry.

    Args:
        results: sums by unit.
        candidates: whose entries are looked for.
        suffix: what follows the entry in the keys.

    Raises:
        DQError: the signal is zero.
    """
    found: dict[Entry, float] = {}
    for entry in candidates.entries():
        key = f"{entry}{suffix}"
        holders = [sums for sums in results.values() if key in sums]
        signal = sum(sums["signal"] for sums in holders)
        if holders and not signal > 0:
            raise DQError("the full-precision output is zero everywhere: noise has nothing to be relative to")
        if holders:
            found[entry] = sum(sums[key] for sums in holders) / signal
    return found


def cost(results: Mapping[str, Sums]) -> float:
    """Denoiser calls of all units together."""
    return sum(sums["calls"] for sums in results.values())


def entries_to_check(table: SensitivityTable, count: int) -> list[Entry]:
    """Entries that tell most about the estimate: for every operand and width as many, its noisiest one first."""
    strata: dict[str, list[Entry]] = {}
    for entry in sorted(table.noise, key=lambda e: -table.noise[e]):
        strata.setdefault(_stratum(entry), []).append(entry)
    each = max(count // max(len(strata), 1), 1)
    chosen = [entries[round(i * (len(entries) - 1) / max(each, 1))] for entries in strata.values() for i in range(each)]
    return list(dict.fromkeys(chosen))[:count]


def naive_cost(candidates: Candidates, calls: int) -> float:
    """Denoiser calls of the naive method: every call again for each entry."""
    return FORWARD * len(candidates.entries()) * calls
