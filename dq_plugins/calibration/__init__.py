"""Calibration: full-precision denoiser calls, recorded once and streamed back by timestep."""

from dq_plugins.calibration.calibration_set import CalibrationSet
from dq_plugins.calibration.call import Call, first_tensor
from dq_plugins.calibration.recorder import record

__all__ = ["CalibrationSet", "Call", "first_tensor", "record"]
