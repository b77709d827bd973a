"""The error of the final image that a plan makes: what all layers do alike, and what each does at random.

Every entry moves the final image by some ``e``, to first order the sum of what it moves at every step, carried on to
the image (`dq_plugins.sensitivity.probes.carried_back`). Two parts of it add up differently over layers:

- *drift*, what all images have in common: the mean of every channel, and the gain along the image itself. Layers add
  up in amplitude: ``c = mean over images of e . u / sqrt(D)`` for each of these directions u of length 1;
- the rest is random: independent between layers, so they add up in power, ``r = mean |e|^2 / D - |c|^2``.

The mean square error of the image is then

    E  =  sum r  +  | sum c |^2

over the entries of a plan. Over the steps no such assumption is made: an error that every step repeats has added up in
amplitude already, one that changes from step to step in power, because the same probe met both at every step.

A mean over few images is partly chance: ``c`` is shrunk by the share of its square that chance explains (the positive
part of James and Stein's factor), so that an allocation cannot play accidents off against each other.

Shapes: ``B`` images, ``C`` channels, ``D`` values of an image, ``F = C + 1`` directions, ``P`` probes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dq_plugins.errors import DQError
from dq_plugins.quantized.candidates import AnyEntry, Candidates
from dq_plugins.sensitivity.jacobian import signs
from dq_plugins.sensitivity.measure import FORWARD, Sums
from dq_plugins.sensitivity.probes import carried_back, cost_of, generator
from dq_plugins.sensitivity.trajectory import Trajectory

Drift = tuple[float, ...]
"""Amplitudes of one entry along the F directions, in units of the image's values."""


@dataclass(frozen=True)
class ImageError:
    """What entries do to the final image.

    Attributes:
        random: mean square error that adds up in power, by entry.
        drift: amplitudes that add up, by entry.
    """

    random: Mapping[AnyEntry, float]
    drift: Mapping[AnyEntry, Drift]

    def of(self, entries: Iterable[AnyEntry]) -> float:
        """Predicted mean square error of the final image with these entries quantized together.

        Raises:
            DQError: one of them was not measured.
        """
        chosen = list(entries)
        missing = [entry for entry in chosen if entry not in self.random]
        if missing:
            raise DQError(f"what {missing[0]} does to the final image was not measured")
        return sum(self.random[e] for e in chosen) + _power(self._sum(chosen))

    def alone(self) -> dict[AnyEntry, float]:
        """Error of every entry with nothing else quantized."""
        return self.beside(())

    def beside(self, entries: Iterable[AnyEntry]) -> dict[AnyEntry, float]:
        """What every entry would add to the error if the other layers were as ``entries`` say.

        The error of a plan is not linear in its entries, because drifts add up; near a plan it is to first order. An
        entry takes the place of the one that ``entries`` have for its operand, if they have one.
        """
        now = {(e.layer, e.operand): self.drift[e] for e in entries}
        total = self._sum(entries)
        found = {}
        for entry, random in self.random.items():
            own = self.drift[entry]
            replaced = now.get((entry.layer, entry.operand), (0.0,) * len(own))
            others = [t - r for t, r in zip(total, replaced, strict=True)] if total else [0.0] * len(own)
            found[entry] = random + _power(own) + 2 * sum(c * o for c, o in zip(own, others, strict=True))
        return found

    def scaled(self, factors: Mapping[AnyEntry, float]) -> ImageError:
        """The same with the error of every entry multiplied."""
        random = {e: r * factors[e] for e, r in self.random.items()}
        drift = {e: tuple(c * math.sqrt(factors[e]) for c in drift) for e, drift in self.drift.items()}
        return ImageError(random, drift)

    def _sum(self, entries: Iterable[AnyEntry]) -> list[float]:
        return [math.fsum(amplitudes) for amplitudes in zip(*(self.drift[e] for e in entries), strict=True)]


def _power(amplitudes: Iterable[float]) -> float:
    return math.fsum(c * c for c in amplitudes)


@dataclass
class DriftProbes:
    """What each entry does to the final image, one recorded sampling run at a time.

    Attributes:
        denoiser: full precision.
        candidates: the quantizers.
        trajectories: recorded sampling runs.
        probes: random probes of the image, ``P``; the directions of drift are probes beside them.
        seed: of the probes.
        by_group: inputs in each timestep group by themselves, see `carried_back`.
    """

    denoiser: nn.Module
    candidates: Candidates
    trajectories: Sequence[Trajectory]
    probes: int = 8
    seed: int = 0
    by_group: bool = False

    def units(self) -> list[str]:
        """One unit of work for each sampling run."""
        return [str(index) for index in range(len(self.trajectories))]

    def __call__(self, unit: str) -> Sums:
        """Sums over images: ``e . u / sqrt(D)`` and its square by direction, and ``|e|^2 / D`` beside all of them."""
        run = self.trajectories[int(unit)]
        final = run.final()
        fixed = directions(final)  # [F, B, ...]
        random = signs((self.probes, *final.shape), generator(self.seed, unit)).to(final)
        probes = torch.cat([fixed, without(fixed, random)])
        images, values = len(final), final[0].numel()
        sums: Sums = {"signal": float(images), "calls": run.steps * (cost_of(self.candidates, len(probes)) - FORWARD)}
        for entry, moved in self._moved(run, probes).items():
            amplitudes, beside = moved.split([len(fixed), self.probes])
            sums[f"{entry}#power"] = float(beside.square().sum()) / self.probes / values
            # a single value of all images together is their sum: as if each had its mean
            share = amplitudes.expand(-1, images) / (1 if amplitudes.shape[1] == images else images) / math.sqrt(values)
            for place, each in enumerate(share):
                sums[f"{entry}#drift{place}"] = float(each.sum())
                sums[f"{entry}#square{place}"] = float(each.square().sum())
        return sums

    def entries(self) -> list[AnyEntry]:
        """What is measured, in order."""
        entries = self.candidates.entries()
        if not self.by_group:
            return list(entries)
        run = self.trajectories[0]  # of an unknown sampler, nothing follows the last call
        visited = sorted(run.calibration.schedule.timesteps[: run.steps])
        return list(dict.fromkeys(self.candidates.in_group(e, t) for e in entries for t in visited))

    def _moved(self, run: Trajectory, probes: Tensor) -> dict[AnyEntry, Tensor]:
        return carried_back(self.denoiser, self.candidates, run, probes, by_group=self.by_group)


def directions(final: Tensor) -> Tensor:
    """Directions of drift at final samples ``[B, C, ...]``, of length 1 for each image: ``[C + 1, B, C, ...]``."""
    channels = final.shape[1]
    found = torch.zeros(channels + 1, *final.shape)
    for channel in range(channels):
        found[channel, :, channel] = 1.0
    spatial = list(range(2, final.dim()))
    found[-1] = final - final.mean(spatial, keepdim=True) if spatial else final  # the gain beside the means
    length = found.flatten(2).norm(dim=2).clamp(min=1e-30)  # [F, B]
    return found / length.reshape(*length.shape, *[1] * (final.dim() - 1))


def without(fixed: Tensor, probes: Tensor) -> Tensor:
    """Probes ``[P, B, ...]`` without what they have along directions ``[F, B, ...]`` of length 1."""
    u, v = fixed.flatten(2), probes.flatten(2)
    along = torch.einsum("fbd,pbd->fpb", u, v)
    return (v - torch.einsum("fpb,fbd->pbd", along, u)).reshape(probes.shape)


def image_error(results: Mapping[str, Sums], entries: Sequence[AnyEntry]) -> ImageError:
    """What `DriftProbes` measured of its entries, over all units."""
    images = sum(sums["signal"] for sums in results.values())
    count = sum(key.startswith(f"{entries[0]}#drift") for key in next(iter(results.values())))

    def mean(key: str) -> float:
        return math.fsum(sums[key] for sums in results.values()) / images

    random, drift = {}, {}
    for entry in entries:
        found = [(mean(f"{entry}#drift{i}"), mean(f"{entry}#square{i}")) for i in range(count)]
        drift[entry] = tuple(_without_chance(amplitude, square, images) for amplitude, square in found)
        inside = sum(square for _, square in found) - _power(drift[entry])
        random[entry] = mean(f"{entry}#power") + max(inside, 0.0)
    return ImageError(random, drift)


def _without_chance(amplitude: float, square: float, images: float) -> float:
    chance = max(square - amplitude**2, 0.0) / max(images - 1, 1.0)
    return amplitude * max(1 - chance / amplitude**2, 0.0) if amplitude else 0.0
