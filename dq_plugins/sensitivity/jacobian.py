"""What every candidate quantizer would move the denoiser's output by, to first order, from one backward pass.

Quantizing a layer's weight moves the layer's output by a known ``d``, quantizing its input moves that by another one;
and the denoiser's output moves by ``J d``, with ``J`` its Jacobian there. For any ``v`` on the output

    v . J d  =  (J' v) . d

and one backward pass gives ``J' v`` at the inputs and outputs of all layers together. Quantizing an attention moves its
output by a known ``d``, too: its definition on the operands of the call, in which the softmax is not linearised.

Shapes: ``P`` cotangents, ``B`` samples in the batch, ``n`` rows of a layer's input or output (or 1: all of them
together). Sums over a row are float32, sums over rows float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dq_plugins.calibration import first_tensor
from dq_plugins.hooks import Arguments, hooked
from dq_plugins.quantized.attention import (
    ObservedAttention,
    QuantizedAttention,
    attending_module,
    quantize_attention,
    simulated_attention,
)
from dq_plugins.quantized.candidates import Candidates, Entry
from dq_plugins.quantized.exact_tokens import ExactTokens
from dq_plugins.timesteps import TimestepContext

CHUNK_BYTES = 2**30
"""How much memory the gradients of several cotangents may take at once; more of them take turns."""


class _Use(NamedTuple):
    """One run of a layer: its input, what else it was given, and its output; of an attention: all that it was given."""

    layer: str
    x: Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    y: Tensor


class JacobianProbe:
    """One differentiable call of the denoiser, and what every candidate would change in it.

    Args:
        denoiser: in eval mode; its parameters need no gradients.
        candidates: the quantizers.
    """

    def __init__(self, denoiser: nn.Module, candidates: Candidates) -> None:
        self.denoiser, self.candidates = denoiser, candidates
        self._layers = {name: denoiser.get_submodule(name) for name in candidates.layers}
        self._attending = {name: denoiser.get_submodule(attending_module(name) or "") for name in candidates.attention}
        self._context = TimestepContext(candidates.groups)
        self._sites: dict[tuple[str, int], QuantizedAttention] = {}
        self._given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._uses: list[_Use] = []

    @contextmanager
    def open(self) -> Iterator[JacobianProbe]:
        """Hook the layers; everything is restored at the end."""
        with ExitStack() as stack:
            stack.callback(self._uses.clear)
            stack.enter_context(hooked(self._layers, before=self._watch_input, first=True))
            stack.enter_context(hooked(self._layers, after=self._watch_output))
            for name, module in self._attending.items():
                site = ObservedAttention()
                stack.enter_context(quantize_attention(module, site))
                stack.enter_context(hooked({name: site}, after=self._watch_attention))
            stack.enter_context(torch.enable_grad())
            yield self

    def _watch_input(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if not args:  # called by keyword, the input first
            (_, x), *named = kwargs.items()
            args, kwargs = (x,), dict(named)
        x = args[0]
        if x.is_floating_point():
            # every layer gets its own tensor: q, k and v may share theirs
            x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        self._given[name] = (x, *args[1:]), kwargs
        return self._given[name]

    def _watch_output(self, name: str, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        (x, *others), keywords = self._given.pop(name)
        return self._used(name, x, tuple(others), keywords, output)

    def _watch_attention(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return self._used(name, None, args, kwargs, output)

    def _used(
        self, name: str, x: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        y = output if output.requires_grad else output.detach().requires_grad_()
        self._uses.append(_Use(name, x, args, kwargs, y))
        return y.clone()  # what follows may change it in place

    def run(self, kwargs: dict[str, Any]) -> Tensor:
        """First tensor of the output, with its graph."""
        self._uses.clear()
        return first_tensor(self.denoiser(**kwargs))

    def backward(
        self, output: Tensor, cotangents: Tensor, timestep: Tensor, sample: Tensor | None = None
    ) -> tuple[dict[Entry, Tensor], Tensor | None]:
        """How far every candidate moves ``cotangent . output``.

        Args:
            output: what `run` returned.
            cotangents: ``[P, *output.shape]``.
            timestep: of the call.
            sample: an input whose gradients are wanted as well.

        Returns:
            By entry, float64 ``[P, n]``; and the gradients ``[P, ...]`` with respect to ``sample``.
        """
        inputs = [use.x for use in self._uses if use.x is not None and use.x.requires_grad]
        wanted = [*inputs, *(use.y for use in self._uses), *([] if sample is None else [sample])]
        size = max(sum(tensor.nbytes for tensor in wanted), 1)
        found: dict[Entry, list[Tensor]] = {}
        onto_sample: list[Tensor] = []
        for chunk in cotangents.split(max(CHUNK_BYTES // size, 1)):
            grads = [torch.autograd.grad(output, wanted, v, retain_graph=True, allow_unused=True) for v in chunk]
            with torch.no_grad():
                by_tensor = {id(t): _stacked([g[i] for g in grads]) for i, t in enumerate(wanted)}
                for entry, moved in self._responses(by_tensor, timestep).items():
                    found.setdefault(entry, []).append(moved)
                gradient = None if sample is None else by_tensor[id(sample)]
                onto_sample += [] if gradient is None else [gradient]
        whole = {entry: torch.cat(parts) for entry, parts in found.items()}
        zero = torch.zeros(len(cotangents), 1, dtype=torch.float64)
        gradients = torch.cat(onto_sample) if onto_sample else None
        return {entry: whole.get(entry, zero) for entry in self.candidates.entries()}, gradients

    def _responses(self, grads: dict[int, Tensor | None], timestep: Tensor) -> dict[Entry, Tensor]:
        found: dict[Entry, Tensor] = {}
        for use in self._uses:
            onto_x, onto_y = grads.get(id(use.x)), grads[id(use.y)]
            if onto_y is not None:
                for bits in self.candidates.weights.get(use.layer, {}):
                    _add(found, Entry(use.layer, "weight", bits), _products(onto_y, self._moved_output(use, bits)))
                for bits in self.candidates.attention.get(use.layer, {}):
                    moved = self._moved_attention(use, bits, timestep)
                    _add(found, Entry(use.layer, "activation", bits), _products(onto_y, moved))
            if use.x is not None and onto_x is not None:
                for bits in self.candidates.activations.get(use.layer, {}):
                    x, layer = use.x.detach(), self._layers[use.layer]
                    moved = self.candidates.fake_input(use.layer, bits, layer, x, timestep) - x
                    _add(found, Entry(use.layer, "activation", bits), _products(onto_x, moved))
        return found

    def _moved_output(self, use: _Use, bits: int) -> Tensor:
        """What the quantized weight moves the layer's output by: the layer is linear in its weight."""
        layer = self._layers[use.layer]
        weight: Any = layer.weight
        x: Any = use.x
        x = x.detach()
        moved = self.candidates.fake_weight(use.layer, bits, layer).detach() - weight.detach()
        with _parameters(layer, weight=moved, bias=None):
            y = layer.forward(x, *use.args, **use.kwargs)
        tokens: ExactTokens | None = getattr(layer, "exact_tokens", None)
        return y if tokens is None else tokens.without_known(x, y)

    def _moved_attention(self, use: _Use, bits: int, timestep: Tensor) -> Tensor:
        """What quantizing an attention moves its own output by."""
        if (use.layer, bits) not in self._sites:
            planned = self.candidates.attention[use.layer][bits]
            self._sites[use.layer, bits] = simulated_attention(self._attending[use.layer], planned, self._context)
        with self._context.select(timestep):
            return self._sites[use.layer, bits](*use.args, **use.kwargs) - use.y


@contextmanager
def _parameters(layer: nn.Module, **values: Tensor | None) -> Iterator[None]:
    """Other parameters for a while, where the layer has them."""
    own: Any = {name: layer._parameters[name] for name in values if name in layer._parameters}
    layer._parameters.update({name: values[name] for name in own})  # type: ignore[arg-type]
    try:
        yield
    finally:
        layer._parameters.update(own)


def _stacked(grads: list[Tensor | None]) -> Tensor | None:
    return None if grads[0] is None else torch.stack([g for g in grads if g is not None])  # [P, ...]


def _products(grads: Tensor, moved: Tensor) -> Tensor:
    """Products of gradients ``[P, n, ...]`` with a change ``[n, ...]``, ``[P, n]``; ``[P, 1]`` of a single row."""
    grads, moved = (grads[:, None], moved[None]) if moved.dim() < 2 else (grads, moved)
    return torch.einsum("pnk,nk->pn", grads.flatten(2).float(), moved.flatten(1).float()).double()


def _add(sums: dict[Entry, Tensor], entry: Entry, values: Tensor) -> None:
    known = sums.get(entry)
    if known is not None and known.shape != values.shape:  # used with several batch sizes: only sums add up
        known, values = (each.sum(1, keepdim=True) for each in (known, values))
    sums[entry] = values if known is None else known + values


def signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent random signs, float32."""
    return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1


def per_sample(values: Tensor, batch: int) -> Tensor:
    """Sums over the rows of every sample, ``[P, n] -> [P, B]``; where rows do not divide by samples, ``[P, 1]``."""
    count = values.shape[1]
    return values.reshape(len(values), batch, -1).sum(2) if count % batch == 0 else values.sum(1, keepdim=True)
