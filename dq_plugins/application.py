"""Apply a plan to a denoiser through an adapter."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from dq_plugins import registry
from dq_plugins.compiled import unwrap
from dq_plugins.errors import DQError, PlanError, RegistryError, close_matches
from dq_plugins.full_precision import require_full_precision
from dq_plugins.libraries import adapter
from dq_plugins.plan import QuantPlan


def apply(
    denoiser: nn.Module,
    plan: QuantPlan | str | Path,
    backend: str = "torchao",
    *,
    inplace: bool = False,
    **options: Any,
) -> nn.Module:
    """Quantize a denoiser as the plan says.

    Args:
        denoiser: the full-precision denoiser the plan was made for. One that is compiled is unwrapped: compile the
            result.
        plan: the plan, or the folder that it was saved to.
        backend: a registered adapter: ``"torchao"``, ``"brevitas"``, ``"simulate"`` (fake quantization), ...
        inplace: change ``denoiser`` itself; otherwise a copy is quantized.
        options: options of the adapter.

    Returns:
        The quantized denoiser.

    Raises:
        RegistryError: unknown backend, or its packages are missing.
        PlanError: the plan is of another model, or needs what the backend does not implement; the denoiser is
            quantized already; an option that the backend does not take.
    """
    require_full_precision(denoiser)
    denoiser = unwrap(denoiser)
    plan = plan if isinstance(plan, QuantPlan) else QuantPlan.load(plan)
    return executor(backend, options).apply(
        denoiser if inplace else copy.deepcopy(denoiser), plan.validate(), **options
    )


def executor(backend: str, options: Iterable[str] = ()) -> Any:
    """The registered adapter ``backend``, if it executes plans with these options.

    Raises:
        RegistryError: unknown backend, one that does not execute plans, or its packages are missing.
        PlanError: an option that it does not take.
    """
    found = adapter(backend)
    if not hasattr(found, "apply"):
        able = [name for name in registry.names("adapter") if _executes_plans(name)]
        raise RegistryError(f"adapter {backend!r} does not execute plans; these do: {', '.join(able)}")
    parameters = inspect.signature(found.apply).parameters.values()
    takes = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    anything = any(each.kind is each.VAR_KEYWORD for each in parameters)
    if unknown := [] if anything else [name for name in options if name not in takes]:
        raise PlanError(
            f"backend {backend!r} takes no option {unknown[0]!r}{close_matches(unknown[0], takes)}; its options: "
            f"{', '.join(takes) or 'none'}"
        )
    return found


def _executes_plans(name: str) -> bool:
    try:
        return hasattr(registry.get("adapter", name), "apply")
    except DQError:  # broken, or not all that it needs is installed
        return False
