"""Denoisers that are not of diffusers: plain modules, by name, with the arguments of one call."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.zoo import foreign_sequences as sequences
from benchmarks.zoo import foreign_unets as unets
from benchmarks.zoo.specimen import Specimen, indices, r, t, whole

S = Specimen

FOREIGN: dict[type[nn.Module], Specimen] = {
    unets.GuidedUNet: S({}, lambda: {"x": r(2, 3, 8, 8), "timesteps": whole(), "y": indices(2)}),
    unets.Edm: S({}, lambda: {"x": r(2, 3, 8, 8), "sigma": t(value=5.0)}),
    unets.LucidUNet: S({}, lambda: {"x": r(2, 3, 8, 8), "time": whole()}),
    unets.ScoreNet: S({}, lambda: {"x": r(2, 3, 8, 8), "time_cond": t(value=5.0)}, timestep="time_cond"),
    unets.PolicyUNet: S({}, lambda: {"sample": r(2, 8, 2), "timestep": whole(), "global_cond": r(2, 6)}),
    unets.DiffWave: S({}, lambda: {"audio": r(2, 16), "diffusion_step": whole(), "spectrogram": r(2, 5, 4)}),
    unets.VideoNet: S({}, lambda: {"x": r(2, 3, 2, 6, 6), "t": torch.tensor([[0.0, 500.0], [0.0, 400.0]])}),
    sequences.DiT: S({}, lambda: {"x": r(2, 4, 8, 8), "t": whole(), "y": indices(2)}),
    sequences.TokenTimes: S({}, lambda: {"x": r(2, 4, 6), "t": torch.tensor([[0.0, 0, 500, 500]] * 2)}),
    sequences.UViT: S({}, lambda: {"x": r(2, 4, 8, 8), "timesteps": whole(), "context": r(2, 5, 6)}),
    sequences.Motion: S({}, lambda: {"x": r(2, 6, 9), "timesteps": whole(), "y": {"text": r(2, 5)}}),
    sequences.Recurrent: S({}, lambda: {"x": r(2, 9, 6), "t": whole()}),
    sequences.StateSpace: S({}, lambda: {"x": r(2, 9, 6), "t": whole()}),
    sequences.Tabular: S({}, lambda: {"x": r(8, 6), "timesteps": whole(8)}),
    sequences.Experts: S({}, lambda: {"x": r(2, 9, 6), "t": whole()}),
    sequences.Branches: S({}, lambda: {"x": r(2, 9, 6), "t": whole()}),
    sequences.Batch: S({}, lambda: {"batch": {"x": r(2, 9, 6), "t": whole()}}, timestep="batch.t"),
    sequences.Keywords: S({}, lambda: {"x": r(2, 9, 6), "t": whole()}, timestep="t"),
}
"""By class."""
