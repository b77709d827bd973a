"""Everything that a plan brings into a denoiser, in one order, whatever makes its layers run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import nn

from dq_plugins.plan import LayerPlan, QuantPlan
from dq_plugins.quantized.attention import MakeSite, install_attention
from dq_plugins.quantized.exact_tokens import WeightOf, install_tokens, own_weight
from dq_plugins.quantized.table_lookup import Outside, install_tables
from dq_plugins.timesteps import NonFinite, OutOfRange, TimestepContext, attach_context

INSTALLED = frozenset({"attention", "temporal_table", "outlier_rows"})
"""What `install_plan` itself does of `QuantPlan.features`."""


def install_plan(
    model: nn.Module,
    plan: QuantPlan,
    make_layers: Callable[[Mapping[str, LayerPlan], TimestepContext], object],
    *,
    adapter: str,
    implemented: Collection[str],
    out_of_range: OutOfRange = "error",
    temporal_fallback: Outside = "error",
    uniform_timesteps: bool = False,
    non_finite: NonFinite = "nan",
    weight_of: WeightOf = own_weight,
    make_attention: MakeSite | None = None,
    check_weights: bool = True,
) -> TimestepContext:
    """Put a plan into a denoiser, in place: context, layers, attention, temporal table, exact tokens, routing.

    Args:
        model: the denoiser, in full precision.
        plan: the plan.
        make_layers: makes layers of ``model`` run as planned, given those that the temporal table does not replace, and
            the context that they select their groups by. Entries that the plan leaves in full precision are among them.
        adapter: name of the backend, for messages.
        implemented: features of the plan that ``make_layers`` does.
        out_of_range: what a timestep outside the calibrated range does: ``"error"``, or ``"nearest"`` group.
        temporal_fallback: what a timestep that the temporal table lacks does: ``"error"``, or ``"live"``.
        uniform_timesteps: every call has one timestep for the whole batch.
        non_finite: what NaN or infinity among the arguments of a call does: ``"nan"`` makes that sample's output NaN,
            ``"error"`` raises.
        weight_of: gives the floating-point weight that a layer of this backend computes with.
        make_attention: makes a module's attention run as planned; simulated by default.
        check_weights: whether ``model`` holds the weights that the plan was made for already.

    Returns:
        The context, attached to ``model``.

    Raises:
        PlanError: the plan is of another model, or needs what this backend does not implement.
    """
    plan.refuse_unimplemented(INSTALLED.union(implemented), adapter)
    if check_weights:
        plan.check_model(model)
    context = TimestepContext(plan.groups, out_of_range, uniform=uniform_timesteps, non_finite=non_finite)
    make_layers({name: layer for name, layer in plan.layers.items() if name not in plan.tabulated}, context)
    install_attention(model, plan.attention, context, make_attention)
    install_tables(model, plan, context, temporal_fallback)
    install_tokens(model, plan, weight_of)
    attach_context(model, context, plan.timestep_argument)
    return context
