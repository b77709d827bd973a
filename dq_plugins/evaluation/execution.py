"""How each layer of a quantized denoiser executes, whichever adapter made it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dq_plugins.plan import QuantPlan


@dataclass(frozen=True)
class LayerExecution:
    """How one layer runs.

    Attributes:
        state: ``"integer"``, ``"simulated"`` or ``"full precision"``.
        width: what the plan asks for, such as ``W8A8``.
        kernel: what multiplies, as the adapter calls it; empty for plain PyTorch.
        compute: dtypes of the multiplication.
        reason: why it does not run in integers; may be empty.
    """

    state: str
    width: str
    kernel: str
    compute: str
    reason: str


def executions(model: nn.Module, plan: QuantPlan) -> dict[str, LayerExecution]:
    """How every planned layer of a quantized denoiser runs.

    An adapter says so by an attribute ``execution`` (with ``state``, ``kernel``, ``compute`` and ``reason``) on the
    module; a planned layer without one is simulated, because adapters that run integers say so.
    """
    found = {}
    for name, layer in plan.layers.items():
        told = getattr(model.get_submodule(name), "execution", None)
        if told is not None:
            found[name] = LayerExecution(told.state, layer.width, told.kernel, told.compute, told.reason)
        elif layer.width == "full precision":
            found[name] = LayerExecution("full precision", layer.width, "", "", layer.kept or "")
        else:
            found[name] = LayerExecution("simulated", layer.width, "", "floating point", "the backend only simulates")
    return found
