"""Block-wise reconstruction of weights: units of layers, their recorded inputs and targets, and the loss."""

from dq_plugins.reconstruction.cache import BlockCache, record_block
from dq_plugins.reconstruction.student import planned_student
from dq_plugins.reconstruction.units import Unit, find_units

__all__ = ["BlockCache", "Unit", "find_units", "planned_student", "record_block"]
