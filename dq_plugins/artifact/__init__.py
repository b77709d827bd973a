"""The one form in which anything goes to disk: a validated JSON record and named tensors under one hash."""

from dq_plugins.artifact.codec import STRICT, StoredTensor
from dq_plugins.artifact.format import Format
from dq_plugins.artifact.units import UnitResults

__all__ = ["STRICT", "Format", "StoredTensor", "UnitResults"]
