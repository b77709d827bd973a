"""The temporal block: what a denoiser computes from the timestep alone (TFMQ-DM), as a program of its own."""

from dq_plugins.temporal.block import TemporalBlock, temporal_block
from dq_plugins.temporal.features import FeatureError, feature_error
from dq_plugins.temporal.finite_set import FiniteSet, finite_set, recorded_conditions
from dq_plugins.temporal.subprogram import Subprogram, extract

__all__ = [
    "FeatureError",
    "FiniteSet",
    "Subprogram",
    "TemporalBlock",
    "extract",
    "feature_error",
    "finite_set",
    "recorded_conditions",
    "temporal_block",
]
