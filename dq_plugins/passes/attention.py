"""Quantizers of the operands of attentions, and what an attention costs; for the pass that plans them and those that
choose widths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from dq_plugins.affine import affine_parameters
from dq_plugins.compiled import evaluating, unwrap
from dq_plugins.graph.macs import count_macs
from dq_plugins.hooks import hooked
from dq_plugins.passes.activations import DEFAULT_GROUPS, input_ranges, shared_rows
from dq_plugins.plan import ActivationQuant, AttentionPlan, QuantPlan
from dq_plugins.plan.attention import OPERANDS
from dq_plugins.quantized.attention import ObservedAttention, attending_module, quantize_attention, site_name
from dq_plugins.recipe import PassContext


def quantized_attentions(plan: QuantPlan) -> dict[str, AttentionPlan]:
    """The attentions that a plan quantizes, by `site_name`."""
    return {site_name(module): each for module, each in plan.attention.items() if each.quantized}


def operand_name(module: str, operand: str) -> str:
    """Fully qualified name of what an operand passes through while the module is observed."""
    return f"{site_name(module)}.{operand}"


@contextmanager
def observed(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Query, key and value of attentions pass through modules of their own, whose inputs can be observed.

    Yields:
        What attends in the place of PyTorch's function, by the names of the modules.
    """
    with ExitStack() as stack:
        sites: dict[str, nn.Module] = {}
        for name, module in modules.items():
            sites[name] = site = ObservedAttention()
            stack.enter_context(quantize_attention(module, site))
        yield sites


def attention_quantizers(
    plan: QuantPlan, context: PassContext, modules: Sequence[str], choices: Sequence[int]
) -> dict[str, dict[int, AttentionPlan]]:
    """Quantizers of the operands of attentions at several widths, in the timestep groups of the layers.

    Args:
        plan: with the groups, and the methods that ranges are chosen by.
        context: of the run.
        modules: that attend.
        choices: widths.

    Returns:
        By module and width; without the order of rows.
    """
    methods, symmetric = plan.range_methods, context.targets.symmetric_acts
    methods = replace(methods, inputs=methods.attention, power=methods.attention_power)
    found: dict[str, dict[int, AttentionPlan]] = {module: {} for module in modules}
    with observed({name: context.denoiser.get_submodule(name) for name in modules}):
        for bits in choices:
            widths = {operand_name(module, operand): bits for module in modules for operand in OPERANDS}
            groups = plan.groups[DEFAULT_GROUPS]
            ranges = input_ranges(context, widths, groups, methods, shared_rows(plan, DEFAULT_GROUPS))
            for module in modules:
                quants = {}
                for operand in OPERANDS:
                    bounds = ranges[operand_name(module, operand)]
                    parameters = affine_parameters(*bounds, bits, symmetric=symmetric)
                    quants[operand] = ActivationQuant(bits, DEFAULT_GROUPS, *(p.cpu() for p in parameters))
                found[module][bits] = AttentionPlan(**quants)
    return found


class AttentionSize(NamedTuple):
    """How large an attention is, for the batch of the example inputs.

    Attributes:
        inputs: elements of query, key and value.
        macs: multiply-accumulate operations of both products.
        value_macs: of them, those of probabilities with values.
    """

    inputs: int
    macs: int
    value_macs: int


def attention_sizes(context: PassContext, sites: Sequence[str]) -> dict[str, AttentionSize]:
    """Sizes of attentions, seen in one recorded call, in which modules that did not run have none.

    Args:
        context: of the run.
        sites: by `site_name`.
    """
    found: dict[str, AttentionSize] = {}

    def look(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        query, key, value = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(OPERANDS))
        shapes = [tuple(x.shape) for x in (query, key, value)]
        macs = count_macs("scaled_dot_product_attention", shapes, tuple(output.shape))
        of_values = query.numel() // query.shape[-1] * key.shape[-2] * value.shape[-1]
        found[name] = AttentionSize(sum(x.numel() for x in (query, key, value)), macs, of_values)

    denoiser = unwrap(context.denoiser)
    modules = {site: denoiser.get_submodule(attending_module(site) or "") for site in sites}
    with observed(modules) as attending, hooked(attending, after=look), evaluating(denoiser):
        denoiser(**context.calibration.example_inputs())
    return found
