"""Differentiable search for timestep groups, and the choice of timesteps to calibrate on (ADP-DM, He et al. 2024)."""

from dq_plugins.group_search.learn import GroupLoss, Learned, learn_groups, mean_loss
from dq_plugins.group_search.relaxation import Relaxation, entropy, start_logits
from dq_plugins.group_search.settings import SearchSettings

__all__ = [
    "GroupLoss",
    "Learned",
    "Relaxation",
    "SearchSettings",
    "entropy",
    "learn_groups",
    "mean_loss",
    "start_logits",
]
