"""Which timestep groups a calibration has visited, and how to calibrate again."""

from __future__ import annotations

from torch import nn

from dq_brevitas.proxy import timestep_proxies
from dq_brevitas.table import TimestepTable


def calibration_coverage(model: nn.Module) -> dict[str, list[int]]:
    """Calls that each timestep group of each quantizer has collected since calibration (re)started.

    Args:
        model: a model with timestep quantizers.

    Returns:
        Quantizer name -> calls per group. A model loaded from a checkpoint has collected none.
    """
    coverage = {}
    for name, proxy in timestep_proxies(model).items():
        if proxy.is_quant_enabled:
            coverage[name] = list(proxy.tensor_quantizer.scaling_impl.counts)
    return coverage


def restart_calibration(model: nn.Module) -> nn.Module:
    """Let the next ``calibration_mode`` (or the first steps of training) collect ranges again.

    A second ``calibration_mode`` on a calibrated model would otherwise change nothing, as in Brevitas. A group that
    the new data does not visit keeps its range.

    Returns:
        ``model``.
    """
    for proxy in timestep_proxies(model).values():
        for module in proxy.modules():
            if isinstance(module, TimestepTable):
                module.restart()
    return model
