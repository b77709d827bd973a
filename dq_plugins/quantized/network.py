"""A denoiser that holds the quantizers of every width at once, and computes with those of one assignment.

Every layer has one set of parameters for each width of its weight and of its input, shared by all assignments that use
the width: nothing is calibrated again for a candidate (TMPQ-DM's "precision solver"). To switch is to point each layer
at another weight and another input quantizer: no tensor is computed once a width has been used.

Source: TMPQ-DM (Sun et al. 2024). Memory: one copy of a weight for each width used, shared by all assignments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.errors import PlanError
from dq_plugins.quantized.attention import QuantizedAttention, simulated_attention
from dq_plugins.quantized.candidates import Candidates
from dq_plugins.quantized.input_quantizers import InputQuantizer, input_quantizer
from dq_plugins.quantized.layer import LayerState, state_of_branch
from dq_plugins.quantized.layer_transform import restored_weight, transformed_weight
from dq_plugins.quantized.run import QuantizedRun
from dq_plugins.quantized.width import Width


class SuperNetwork(QuantizedRun):
    """Switches a denoiser between assignments of widths while it is open; afterwards the denoiser is as it was.

    Args:
        denoiser: full precision; changed while the network is open, restored exactly when it is closed.
        candidates: the quantizers of every layer, operand and width.
        timestep: name of the denoiser's timestep argument.

    Example::

        with SuperNetwork(denoiser, candidates, "timestep") as network:
            network.switch({"conv_in": Width(8, 8), "conv_out": Width(4, None)})
            denoiser(**inputs)
    """

    def __init__(self, denoiser: nn.Module, candidates: Candidates, timestep: str) -> None:
        super().__init__(denoiser, (*candidates.layers, *candidates.attention), candidates.groups, timestep)
        self.candidates = candidates
        self._weights: dict[tuple[str, int], Tensor] = {}
        self._inputs: dict[tuple[str, int], InputQuantizer] = {}
        self._branches: dict[tuple[str, bool], tuple[Tensor | None, bool]] = {}
        self._sites: dict[tuple[str, int], QuantizedAttention] = {}

    def switch(self, widths: Mapping[str, Width]) -> None:
        """Compute with an assignment from now on; layers that it does not name are in full precision.

        Args:
            widths: by layer.

        Raises:
            PlanError: the network is closed, or a layer has no such width.
        """
        self.use(self.states(widths))

    def states(self, widths: Mapping[str, Width]) -> dict[str, LayerState]:
        """What layers compute with at some widths.

        Raises:
            PlanError: a layer has no such width.
        """
        return {name: self._state(name, width) for name, width in widths.items()}

    def _state(self, name: str, width: Width) -> LayerState:
        if name in self.attending:
            return LayerState(quantizer=None if width.activation is None else self._site(name, width.activation))
        weight = None if width.weight is None else self._weight(name, width.weight)
        quantizer = None if width == Width() else self.input(name, width.activation)
        branch, inside = self.branch(name, quantizer)
        return LayerState(weight, quantizer, branch=branch, inside=inside)

    def _site(self, name: str, bits: int) -> QuantizedAttention:
        if (name, bits) not in self._sites:
            planned = self._candidate("activation", name, bits)
            self._sites[name, bits] = simulated_attention(self.attending[name], planned, self.context)
        return self._sites[name, bits]

    def branch(self, name: str, quantizer: nn.Module | None) -> tuple[Tensor | None, bool]:
        """The low-rank branch of a layer, `LayerState.branch` and ``inside``, beside this quantizer of its input."""
        key = name, quantizer is None
        if key not in self._branches:
            transform = self.candidates.transforms.get(name)
            self._branches[key] = state_of_branch(transform, self.full_weight(name), quantizer)
        return self._branches[key]

    def _weight(self, name: str, bits: int) -> Tensor:
        if (name, bits) not in self._weights:
            self._candidate("weight", name, bits)
            with torch.no_grad():
                module, transform = self.modules[name], self.candidates.transforms.get(name)
                weight = transformed_weight(module, transform, self.full_weight(name))
                fake = restored_weight(module, self.candidates.weights[name][bits].fake_quantize(weight), transform)
            self._weights[name, bits] = nn.Parameter(fake, requires_grad=False)
        return self._weights[name, bits]

    def input(self, name: str, bits: int | None) -> InputQuantizer | None:
        """The quantizer of a layer's input at a width; None in full precision, where nothing is done to it."""
        if (name, bits) not in self._inputs:
            quant = None if bits is None else self._candidate("activation", name, bits)
            device, transform = self.full_weight(name).device, self.candidates.transforms.get(name)
            given = self.modules[name], device, transform, self.candidates.rows.get(name)
            self._inputs[name, bits] = input_quantizer(quant, self.context, *given)
        return self._inputs[name, bits]

    def _candidate(self, operand: str, name: str, bits: int) -> Any:
        table = self.candidates.weights if operand == "weight" else self.candidates.inputs
        found = table.get(name, {})
        if bits not in found:
            raise PlanError(
                f"layer {name!r} has no {operand} quantizer of {bits} bits in this super-network; it has: "
                f"{', '.join(map(str, sorted(found))) or 'none'}"
            )
        return found[bits]
