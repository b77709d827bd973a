"""How each layer of a quantized denoiser executes, whichever adapter made it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from dq_plugins.plan import QuantPlan
from dq_plugins.report.table import Table

FLOATING = "full precision"


@dataclass(frozen=True)
class LayerExecution:
    """How one layer runs.

    Attributes:
        state: ``"integer"``, ``"simulated"`` or ``"full precision"``.
        width: what the plan asks for, such as ``W8A8``.
        kernel: what multiplies, as the adapter calls it; empty for plain PyTorch.
        compute: dtypes of the multiplication.
        reason: why it does not run in integers; may be empty.
        bits: what one stored value of the weight takes.
        bytes: what the stored weight takes, without scales.
    """

    state: str
    width: str
    kernel: str
    compute: str
    reason: str
    bits: int = 0
    bytes: int = 0

    @property
    def used_width(self) -> str:
        """The width it runs in; empty for a layer that stays in full precision, whatever the plan asks for."""
        return "" if self.state == FLOATING else self.width


def executions(model: nn.Module, plan: QuantPlan) -> dict[str, LayerExecution]:
    """How every planned layer and every attention of a quantized denoiser runs.

    An adapter says so by an attribute ``execution`` (with ``state``, ``kernel``, ``compute`` and ``reason``, and
    ``bits`` and ``bytes`` where it stores the weight in a form of its own) on the module; a planned layer without one
    is simulated, because adapters that run integers say so.
    """
    found = {}
    for name, layer in (*plan.layers.items(), *plan.attention.items()):
        module = model.get_submodule(name)
        told = getattr(module, "execution", None)
        if told is not None:
            how = (told.state, layer.width, told.kernel, told.compute, told.reason)
        elif layer.width == "full precision":
            how = ("full precision", layer.width, "", "", layer.why)
        else:
            how = ("simulated", layer.width, "", "floating point", "the backend only simulates")
        found[name] = LayerExecution(*how, *_stored(module, told))
    return found


def execution_table(executions: Mapping[str, LayerExecution]) -> Table:
    """Layers by how they run and why."""
    # what follows a colon is about one layer: the page lists it, layer by layer
    counts = Counter(
        (e.state, e.used_width, e.kernel or e.compute, e.reason.partition(":")[0]) for e in executions.values()
    )
    rows = [[n, *key] for key, n in counts.most_common()]
    return Table(["layers", "run", "width", "kernel", "why"], rows)


def layer_table(executions: Mapping[str, LayerExecution]) -> Table:
    """Every layer: how it runs, in which dtypes, what its weight takes without scales, and why."""
    rows = [
        [name, e.state, e.used_width, e.kernel, e.compute, e.bits, e.bytes, e.reason] for name, e in executions.items()
    ]
    return Table(["layer", "runs", "width", "kernel", "compute", "bits stored", "bytes", "why"], rows)


def _stored(module: nn.Module, told: object) -> tuple[int, int]:
    """Bits of a stored value and bytes of the weight: as the adapter says, else those of a plain weight."""
    if getattr(told, "bits", 0):
        return told.bits, told.bytes  # type: ignore[attr-defined]
    weight = getattr(module, "weight", None)
    return (8 * weight.element_size(), weight.nbytes) if isinstance(weight, Tensor) else (0, 0)
