"""One set of quantization parameters for each layer and width, shared by every assignment of widths."""

from dq_plugins.supernet.calibrate import CalibrationOptions, calibrate
from dq_plugins.supernet.network import SuperNetwork

__all__ = ["CalibrationOptions", "SuperNetwork", "calibrate"]
