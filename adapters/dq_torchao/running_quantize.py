"""The denoiser that the running ``quantize_`` was called with.

torchao hands a handler one layer at a time, and timesteps arrive at the denoiser, so the handler needs the module that
``quantize_`` was called with. torchao does not pass it on; it is read from the frame of ``quantize_``, which holds it
under the name of its public argument. A registry of "the denoiser being prepared" or a global forward hook would do
the same with state that outlives the call. Where there is no such frame, the error says how to pass the denoiser.
"""

from __future__ import annotations

import sys

from torch import nn
from torchao.quantization import quantize_

from dq_plugins.errors import DQError


def module_being_quantized(config: str, instead: str) -> nn.Module:
    """The first argument of the running ``quantize_``.

    Args:
        config: name of the config that needs it, for the message.
        instead: what to call where there is no ``quantize_``.

    Raises:
        DQError: no ``quantize_`` is running.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is quantize_.__code__:
            return frame.f_locals["model"]
        frame = frame.f_back
    raise DQError(
        f"{config} was applied to a layer outside torchao's quantize_(denoiser, config), so the denoiser is not known. "
        f"Call quantize_ on the whole denoiser, or use {instead}."
    )
