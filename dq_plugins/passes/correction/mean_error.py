"""The mean error of every quantized layer's output, by timestep group and output channel, in one sweep.

For each recorded call the full-precision denoiser runs first and leaves the mean of each layer's output. Then the
quantized one runs on the same inputs, and each layer's mean is put right as soon as it is there, before the next layer
sees it: what later layers are found to be wrong by does not count the means that earlier ones will have corrected.
The correction of a group is the mean over its calls.

A mean over few calls is partly chance. It is shrunk towards zero by the share of its square that chance explains,
``m^2 / (m^2 + v / n)`` with ``v`` the variance between samples, pooled over the channels of a layer and group.

Source: Nagel et al. 2019 (DFQ), section 4.2, which corrects the bias of one network; here one for each timestep group,
measured on calls, sequentially as in Banner et al. 2019.

Shapes: ``G`` timestep groups, ``O`` output channels, ``N`` samples of a layer's output, ``B`` of the call. Sums are
float64.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.calibration import CalibrationSet
from dq_plugins.calibration.call import Call
from dq_plugins.hooks import hooked
from dq_plugins.layer_kinds import LayerKind, kind_of
from dq_plugins.quantized.output_correction import spread_channels
from dq_plugins.quantized.run import QuantizedRun, States
from dq_plugins.recipe import PassContext
from dq_plugins.timesteps import RowOrder, TimestepGroups, by_sample_or_token, fit_to_input


class OutputMeans:
    """Means of the outputs that layers give in full precision, of recorded calls.

    Args:
        layers: by name.
        rows: where the samples of a call are in the input of each layer, and in its output.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], rows: Mapping[str, RowOrder | None] = MappingProxyType({})
    ) -> None:
        self.layers, self.rows = layers, rows
        self._kept: dict[int, dict[str, list[Tensor]]] = {}  # by call and layer, of every use of the layer: [N, O]

    @contextmanager
    def watching(self, call: Call) -> Iterator[None]:
        """Keep the means of a call that runs in the ``with`` block."""
        means: dict[str, list[Tensor]] = defaultdict(list)

        def keep(name: str, args: Any, kwargs: Any, output: Tensor) -> None:
            means[name].append(self.of_output(name, output))

        with hooked(self.layers, after=keep):
            yield
        self._kept[call.index] = means

    def taken(self, call: Call, denoiser: nn.Module) -> dict[str, list[Tensor]]:
        """Of a call, which runs if it was not watched; they are not kept any longer."""
        if call.index not in self._kept:
            with self.watching(call):
                call.run(denoiser)
        return self._kept.pop(call.index)

    def of_output(self, layer: str, output: Tensor) -> Tensor:
        """Of one output, ``[N, O]``."""
        return channel_means(self.layers[layer], _samples_first(output, self.rows.get(layer)))


def output_means(context: PassContext, calls: CalibrationSet) -> OutputMeans:
    """Means of the outputs of all layers that multiply, in some of the recorded calls; shared by later passes."""
    infos = context.partition.layers.items()
    layers = {name: context.denoiser.get_submodule(name) for name, info in infos if not info.lookup}
    return context.shared(("output means", calls.hash), lambda: OutputMeans(layers, context.row_orders))


class MeanErrors:
    """Mean errors of some layers, summed over calls.

    Args:
        run: of the denoiser, closed.
        states: what its layers compute with when they are quantized.
        groups: timestep groups of each layer to correct.
        full: means of what these layers give in full precision, as far as they are known.
    """

    def __init__(
        self, run: QuantizedRun, states: States, groups: Mapping[str, TimestepGroups], full: OutputMeans
    ) -> None:
        self.run, self.states, self.groups, self.full, self.rows = run, states, groups, full, full.rows
        self._layers = {name: run.modules[name] for name in groups}
        self._sums: dict[str, Tensor] = {}  # [3, G, O]: numbers, sums and sums of squares of samples' errors

    def see(self, call: Call) -> None:
        """Run a call in full precision, unless its means are known, then quantized."""
        means = self.full.taken(call, self.run.denoiser)

        def correct(name: str, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            error = means[name].pop(0) - self.full.of_output(name, output)
            correction = self._add(name, call.timestep, error)  # [N, O]
            first = _samples_first(output, self.rows.get(name))
            return output + _samples_first(_spread(self._layers[name], correction, first), self.rows.get(name))

        with self.run:
            self.run.use(self.states)
            with hooked(self._layers, after=correct):
                call.run(self.run.denoiser)

    def table(self, layer: str) -> Tensor:
        """Correction of each group, float32 ``[G, O]``; a group that no call visited gets that of its neighbour."""
        count, total, squares = self._sums[layer]
        number = count[:, :1].clamp(min=1)  # [G, 1]
        mean = total / number
        chance = (squares / number - mean.square()).clamp(min=0) / number  # [G, O]
        signal = mean.square().mean(1, keepdim=True)
        share = signal / (signal + chance.mean(1, keepdim=True)).clamp(min=1e-300)
        table = mean * torch.where(number > 1, share, torch.ones_like(share))
        visited = (count[:, 0] > 0).nonzero().flatten()
        nearest = (torch.arange(len(table))[:, None] - visited).abs().argmin(1)
        return table[visited[nearest]].float()

    def _add(self, layer: str, timesteps: Tensor, errors: Tensor) -> Tensor:
        """See the mean error of every sample of a call, ``[N, O]``; gives the mean of each sample's group, ``[N, O]``.

        ``timesteps`` is ``[1]`` or ``[B]``; N is a multiple of B.
        """
        groups = self.groups[layer]
        index = groups.index(by_sample_or_token(timesteps)).cpu()
        if index.numel() > 1:
            order = self.rows.get(layer)
            index = fit_to_input(index, errors, rows="first" if order == "second" else order)
        index = index.expand(len(errors))
        seen = torch.stack([torch.ones_like(errors), errors, errors.square()]).double()  # [3, N, O]
        of_call = seen.new_zeros(3, len(groups), errors.shape[1]).index_add_(1, index, seen)
        self._sums[layer] = self._sums.get(layer, 0) + of_call
        return (of_call[1] / of_call[0].clamp(min=1))[index].to(errors.dtype)


def _samples_first(output: Tensor, rows: RowOrder | None) -> Tensor:
    """``[B, S, ..., O]`` of a layer that sees ``[S, B, ..., C]``, or the other way round."""
    return output.transpose(0, 1) if rows == "second" and output.dim() > 2 else output


def channel_means(layer: nn.Module, output: Tensor) -> Tensor:
    """Mean over the positions of each sample, float32 ``[N, O]``; N is 1 for an output without samples."""
    kind = kind_of(layer)
    assert kind is not None
    moved = output.detach().float().movedim(kind.channel_axis, -1)  # [N, ..., O]
    moved = moved if _batched(kind, output) else moved[None]
    return moved.reshape(len(moved), -1, moved.shape[-1]).mean(1)


def _spread(layer: nn.Module, values: Tensor, output: Tensor) -> Tensor:
    """``[N, O]``, shaped to be added to the layer's output."""
    kind = kind_of(layer)
    assert kind is not None
    return spread_channels(kind, values, output) if _batched(kind, output) else kind.per_output(values[0])


def _batched(kind: LayerKind, output: Tensor) -> bool:
    return output.dim() > 1 + kind.spatial
