"""The dependency graph of a denoiser and what follows from it: temporal block and its boundary, roles, channels."""

from dq_plugins.graph.arguments import TIMESTEP_NAMES, find_timestep_argument
from dq_plugins.graph.block_boundary import BoundaryTensor
from dq_plugins.graph.partition import LayerInfo, Partition, partition
from dq_plugins.graph.roles import Role
from dq_plugins.graph.signatures import SIGNATURES, Signature
from dq_plugins.graph.summary import summarise
from dq_plugins.graph.trace import trace

__all__ = [
    "SIGNATURES",
    "TIMESTEP_NAMES",
    "BoundaryTensor",
    "LayerInfo",
    "Partition",
    "Role",
    "Signature",
    "find_timestep_argument",
    "partition",
    "summarise",
    "trace",
]
