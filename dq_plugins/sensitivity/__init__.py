"""How much quantizing one layer's weight or input at one width disturbs the denoiser, for all layers and widths."""

from dq_plugins.quantized.candidates import Candidates, Entry, Operand
from dq_plugins.sensitivity.exact_noise import ExactContent, ExactQuality
from dq_plugins.sensitivity.measure import measure
from dq_plugins.sensitivity.probes import ContentProbes, QualityProbes
from dq_plugins.sensitivity.sensitivity_table import SensitivityTable
from dq_plugins.sensitivity.trajectory import Trajectory, trajectories_of

__all__ = [
    "Candidates",
    "ContentProbes",
    "Entry",
    "ExactContent",
    "ExactQuality",
    "Operand",
    "QualityProbes",
    "SensitivityTable",
    "Trajectory",
    "measure",
    "trajectories_of",
]
