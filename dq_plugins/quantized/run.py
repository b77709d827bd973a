"""A denoiser some of whose layers are quantized for a while."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from dq_plugins.errors import PlanError
from dq_plugins.plan import QuantPlan
from dq_plugins.quantized.attention import (
    SwitchedAttention,
    attending_module,
    install_attention,
    simulated_attention,
    site_name,
)
from dq_plugins.quantized.exact_tokens import install_tokens
from dq_plugins.quantized.layer import LayerState, QuantizedLayer, planned_state
from dq_plugins.quantized.memory import is_large
from dq_plugins.quantized.table_lookup import install_tables
from dq_plugins.timesteps import OutOfRange, TimestepContext, TimestepGroups, attach_context, context_of, detach_context

States = Mapping[str, LayerState]


class QuantizedRun:
    """Quantizes layers of a denoiser while it is open; afterwards the denoiser is exactly as it was, come what may.

    Args:
        denoiser: full precision.
        layers: fully qualified names of those that are ever quantized; attentions among them, by `site_name`.
        groups: the timestep groups that quantizers name.
        timestep: name of the denoiser's timestep argument.
        out_of_range: what a timestep outside the calibrated range does: ``"error"``, or ``"nearest"`` group.
        plan: its attention, but for those among ``layers``, its temporal table and its exact tokens are there while the
            run is open; none by default.

    Attributes:
        context: knows the timestep group of the running call; for input quantizers.
        modules: the layers, by name.
        attending: the modules whose attention is ever quantized, by its `site_name`.

    Example::

        with QuantizedRun(denoiser, plan.layers, plan.groups, "timestep") as run:
            run.use(planned_states(run, plan))
            denoiser(**inputs)              # quantized
            run.use({})
            denoiser(**inputs)              # full precision
    """

    def __init__(
        self,
        denoiser: nn.Module,
        layers: Iterable[str],
        groups: Mapping[str, TimestepGroups],
        timestep: str,
        *,
        out_of_range: OutOfRange = "error",
        plan: QuantPlan | None = None,
    ) -> None:
        self.denoiser, self.timestep, self.plan = denoiser, timestep, plan
        self.context = TimestepContext(groups, out_of_range)
        self.modules: dict[str, nn.Module] = {}
        self.attending: dict[str, nn.Module] = {}
        for name in layers:
            module = attending_module(name)
            found = self.modules if module is None else self.attending
            found[name] = denoiser.get_submodule(name if module is None else module)
        self._layers: dict[str, QuantizedLayer] = {}
        self._attention = {name: SwitchedAttention(module) for name, module in self.attending.items()}
        self._restore = ExitStack()

    @property
    def is_open(self) -> bool:
        """Whether the denoiser can be quantized now."""
        return bool(self._layers) or context_of(self.denoiser) is self.context

    def __enter__(self) -> Self:
        if self.is_open:
            raise PlanError("this run is open already; two states cannot run in one denoiser")
        if context_of(self.denoiser) is not None:
            raise PlanError("the denoiser is quantized already; a quantized run starts from full precision")
        with ExitStack() as stack:
            attach_context(self.denoiser, self.context, self.timestep)
            stack.callback(detach_context, self.denoiser)
            stack.callback(self._layers.clear)
            for name, module in self.modules.items():
                self._layers[name] = QuantizedLayer(module)
                stack.callback(self._layers[name].remove)
            for switched in self._attention.values():
                stack.callback(switched.use, None)
            if self.plan is not None:
                others = {n: a for n, a in self.plan.attention.items() if site_name(n) not in self.attending}
                stack.enter_context(install_attention(self.denoiser, others, self.context))
                stack.enter_context(install_tables(self.denoiser, self.plan, self.context))
                stack.enter_context(install_tokens(self.denoiser, self.plan))
            self._restore = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._restore.close()

    def use(self, states: States) -> None:
        """Compute with these states from now on; layers and attentions that they do not name are in full precision.

        The quantizer of an attention's state is its `QuantizedAttention`.

        Raises:
            PlanError: the run is closed, or was not made for a layer.
        """
        if not self.is_open:
            raise PlanError("open the run first: with QuantizedRun(...) as run")
        unknown = sorted(states.keys() - self.modules.keys() - self.attending.keys())
        if unknown:
            raise PlanError(f"layer {unknown[0]!r} is none of the {len(self.modules)} layers of this quantized run")
        for name, layer in self._layers.items():
            layer.use(states.get(name, LayerState()))
        for name, switched in self._attention.items():
            site: Any = states[name].quantizer if name in states else None
            switched.use(site)

    def put(self, name: str, state: LayerState) -> None:
        """One layer computes with this state from now on; the others with what they have."""
        self._layers[name].use(state)

    def at(self, timestep: Tensor | float) -> AbstractContextManager[Any]:
        """Select the groups of a timestep for a ``with`` block, in which parts of the denoiser run by themselves."""
        return self.context.select(timestep)

    def full_weight(self, name: str) -> Tensor:
        """The full-precision weight of a layer, whatever it computes with now."""
        layer = self._layers.get(name)
        weight: Any = self.modules[name].weight if layer is None else layer.full
        return weight.detach()


def planned_run(
    denoiser: nn.Module,
    plan: QuantPlan,
    others: Iterable[str] = (),
    *,
    whole: bool = False,
    out_of_range: OutOfRange = "error",
) -> QuantizedRun:
    """A run for the layers that a plan quantizes.

    Args:
        denoiser: full precision.
        plan: the plan.
        others: further layers, or attentions, that are ever quantized.
        whole: the plan's temporal table and exact tokens are there too while the run is open.
        out_of_range: see `QuantizedRun`.
    """
    layers = dict.fromkeys([*(name for name, layer in plan.layers.items() if layer.quantized), *others])
    brought = plan if whole else None
    return QuantizedRun(denoiser, layers, plan.groups, plan.timestep_argument, out_of_range=out_of_range, plan=brought)


def planned_states(
    run: QuantizedRun,
    plan: QuantPlan,
    layers: Iterable[str] | None = None,
    *,
    quantize_inputs: bool = True,
    spare_memory: bool = False,
) -> dict[str, LayerState]:
    """The states of a plan's layers, made before anything is quantized.

    Args:
        run: of the denoiser, closed or in full precision.
        plan: the plan.
        layers: which of them; all by default.
        quantize_inputs: whether inputs are quantized too, where the plan says how.
        spare_memory: of a large denoiser (`dq_plugins.quantized.memory.is_large`), make each weight when its layer
            runs: one at a time, in place of a second copy of all of them.
    """
    how = {"quantize_inputs": quantize_inputs, "streamed": spare_memory and is_large(run.denoiser)}
    states = {}
    for name in (*run.modules, *run.attending) if layers is None else layers:
        module = attending_module(name)
        if module is None:
            states[name] = planned_state(run.modules[name], plan.layers[name], run.context, **how)
        elif quantize_inputs:
            site = simulated_attention(run.attending[name], plan.attention[module], run.context)
            states[name] = LayerState(quantizer=site)
    return states


WIDE = 8
"""Bits of an input whose errors are small beside those of narrower ones."""


def narrow_inputs(plan: QuantPlan) -> list[str]:
    """Layers whose inputs have fewer than `WIDE` bits, in one timestep group at least."""
    inputs = {name: layer.activation for name, layer in plan.layers.items() if layer.activation is not None}
    least = {name: a.narrowest for name, a in inputs.items()}
    return [name for name, bits in least.items() if bits < WIDE]


def sees_quantized_inputs(plan: QuantPlan, chosen: bool | None = None) -> bool:
    """Whether what learns against a plan runs with quantized inputs.

    Args:
        plan: the plan so far.
        chosen: yes or no; None: where the plan has `narrow_inputs`, whose errors a weight can mend.
    """
    return bool(narrow_inputs(plan)) if chosen is None else chosen
