"""Our method in diffusers' tables, under a name of its own, from the moment this package is imported."""

from __future__ import annotations

import logging
from typing import Any

from dq_diffusers.host import NOISY
from dq_plugins.quiet import loggers_at


def register() -> None:
    """Make the entries; a second call changes nothing."""
    with loggers_at(logging.ERROR, NOISY):
        from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

        from dq_diffusers.config import ON_DISK, DQConfig, Method

    AUTO_QUANTIZER_MAPPING[Method.DQ.value] = _quantizer
    for name in (Method.DQ.value, ON_DISK):
        AUTO_QUANTIZATION_CONFIG_MAPPING[name] = DQConfig


def _quantizer(quantization_config: Any, **kwargs: Any) -> Any:
    """The quantizer, imported at first use: it needs torchao, and pipelines are recorded without."""
    from dq_diffusers.quantizer import DQQuantizer

    return DQQuantizer(quantization_config, **kwargs)
