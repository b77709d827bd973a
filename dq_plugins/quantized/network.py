"""A denoiser that holds the quantizers of every width at once, and computes with those of one assignment.

Every layer has one set of parameters for each width of its weight and of its input, shared by all assignments that use
the width: nothing is calibrated again for a candidate (TMPQ-DM's "precision solver"). To switch is to point each layer
at another weight and another input quantizer: no tensor is computed once a width has been used.

Source: TMPQ-DM (Sun et al. 2024). Memory: one copy of a weight for each width used, shared by all assignments.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.errors import PlanError
from dq_plugins.quantized.candidates import Candidates
from dq_plugins.quantized.simulate import ActivationQuantizer
from dq_plugins.quantized.width import Width
from dq_plugins.timesteps import TimestepContext, attach_context, context_of, detach_context


class SuperNetwork:
    """Switches a denoiser between assignments of widths while it is open; afterwards the denoiser is as it was.

    Args:
        denoiser: full precision; changed while the network is open, restored exactly when it is closed.
        candidates: the quantizers of every layer, side and width.
        timestep: name of the denoiser's timestep argument.

    Example::

        with SuperNetwork(denoiser, candidates, "timestep") as network:
            network.switch({"conv_in": Width(8, 8), "conv_out": Width(4, None)})
            denoiser(**inputs)
    """

    def __init__(self, denoiser: nn.Module, candidates: Candidates, timestep: str) -> None:
        self.denoiser, self.candidates, self.timestep = denoiser, candidates, timestep
        self._context = TimestepContext(candidates.groups)
        self._layers = {name: denoiser.get_submodule(name) for name in candidates.layers}
        self._full: dict[str, nn.Parameter] = {}
        self._weights: dict[tuple[str, int], nn.Parameter] = {}
        self._inputs: dict[tuple[str, int], ActivationQuantizer] = {}
        self._active: dict[str, ActivationQuantizer] = {}
        self._handles: list[Any] = []
        self._open = False

    def __enter__(self) -> SuperNetwork:
        if self._open:
            raise PlanError("this super-network is open already; two assignments cannot run in one denoiser")
        if context_of(self.denoiser) is not None:
            raise PlanError("the denoiser is quantized already; a super-network starts from full precision")
        self._open = True
        self._full = {name: layer._parameters["weight"] for name, layer in self._layers.items()}  # type: ignore[misc]
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._quantize_input(name)))
        attach_context(self.denoiser, self._context, self.timestep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, weight in self._full.items():
            self._layers[name]._parameters["weight"] = weight
        for handle in self._handles:
            handle.remove()
        detach_context(self.denoiser)
        self._full, self._handles, self._active, self._open = {}, [], {}, False

    def switch(self, widths: Mapping[str, Width]) -> None:
        """Compute with an assignment from now on; layers that it does not name are in full precision.

        Args:
            widths: by layer.

        Raises:
            PlanError: the network is closed, or a layer has no such width.
        """
        if not self._open:
            raise PlanError("open the super-network first: with SuperNetwork(...) as network")
        unknown = sorted(widths.keys() - self._layers.keys())
        if unknown:
            raise PlanError(f"layer {unknown[0]!r} has no candidates in this super-network")
        active = {}
        for name, layer in self._layers.items():
            width = widths.get(name, Width())
            layer._parameters["weight"] = self._weight(name, width.weight)
            if width.activation is not None:
                active[name] = self._input(name, width.activation)
        self._active = active

    def _weight(self, name: str, bits: int | None) -> nn.Parameter:
        if bits is None:
            return self._full[name]
        if (name, bits) not in self._weights:
            quant = self._candidate("weight", name, bits)
            with torch.no_grad():
                fake = quant.fake_quantize(self._full[name].detach())
            self._weights[name, bits] = nn.Parameter(fake, requires_grad=False)
        return self._weights[name, bits]

    def _input(self, name: str, bits: int) -> ActivationQuantizer:
        if (name, bits) not in self._inputs:
            quant = self._candidate("activation", name, bits)
            self._inputs[name, bits] = ActivationQuantizer(quant, self._context, self._full[name].device)
        return self._inputs[name, bits]

    def _candidate(self, side: str, name: str, bits: int) -> Any:
        table = self.candidates.weights if side == "weight" else self.candidates.activations
        found = table.get(name, {})
        if bits not in found:
            raise PlanError(
                f"layer {name!r} has no {side} quantizer of {bits} bits in this super-network; it has: "
                f"{', '.join(map(str, sorted(found))) or 'none'}"
            )
        return found[bits]

    def _quantize_input(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            quantizer = self._active.get(name)
            if quantizer is None or not isinstance(args[0], Tensor):
                return None
            return (quantizer(args[0]), *args[1:])

        return hook
