"""Timesteps and bits chosen together: the space, the evolutionary search, and the exact program beside it."""

from dq_plugins.evolution.search import Evolution, EvolutionOptions, Fitness, random_search
from dq_plugins.evolution.space import Candidate, LayerMenu, Space
from dq_plugins.evolution.state import Scored, SearchState

__all__ = [
    "Candidate",
    "Evolution",
    "EvolutionOptions",
    "Fitness",
    "LayerMenu",
    "Scored",
    "SearchState",
    "Space",
    "random_search",
]
