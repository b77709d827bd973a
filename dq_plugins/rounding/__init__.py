"""Learned rounding of weights (AdaRound): the relaxation, its schedule, and the loop that optimises it."""

from dq_plugins.rounding.learn import RoundingOptions, RoundingResult, learn_rounding
from dq_plugins.rounding.soft import SoftRounding

__all__ = ["RoundingOptions", "RoundingResult", "SoftRounding", "learn_rounding"]
