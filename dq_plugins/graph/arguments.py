"""Which argument of a denoiser's forward is which, and the tensors in nested arguments and outputs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.compiled import unwrap
from dq_plugins.errors import TimestepError, TraceError

TIMESTEP_NAMES = (
    "timestep", "timesteps", "time_step", "time_steps", "diffusion_step", "diffusion_steps", "timestep_ratio",
    "t", "ts", "time", "times", "sigma", "sigmas", "noise_level", "noise_levels", "noise_label", "noise_labels",
    "c_noise", "log_snr", "logsnr", "lambda_t", "gamma", "gammas",
)  # fmt: skip
"""Names that denoisers use for the timestep, most specific first: the first one found wins."""


def forward_signature(denoiser: nn.Module) -> inspect.Signature:
    """Signature of the denoiser's forward, ``self`` left out.

    A forward set on the instance (by a hook library, for example) counts only where the class's own forward names
    nothing: wrappers often take ``*args, **kwargs``.
    """
    module = unwrap(denoiser)
    of_class = inspect.signature(type(module).forward.__get__(module))
    return of_class if _names(of_class) else inspect.signature(module.forward)


def argument_names(denoiser: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of the denoiser's forward, in order; ``self`` and ``*``/``**`` left out."""
    return _names(forward_signature(denoiser))


def _names(signature: inspect.Signature) -> tuple[str, ...]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(p.name for p in signature.parameters.values() if p.kind not in variadic)


def find_timestep_argument(denoiser: nn.Module, timestep: str | None = None) -> str:
    """The name of the argument that carries the timestep.

    Args:
        denoiser: any module that sampling calls once a step.
        timestep: its name, where it is not one of `TIMESTEP_NAMES`; checked against the signature. Inside another
            argument, dotted: ``"batch.t"`` is the entry ``"t"`` of the dictionary ``batch``.

    Returns:
        The argument's name.

    Raises:
        TimestepError: no argument has a usual name, or the given name is not an argument.

    Example:
        >>> class Denoiser(nn.Module):
        ...     def forward(self, x, sigma, context=None): ...
        >>> find_timestep_argument(Denoiser())
        'sigma'
    """
    names = argument_names(denoiser)
    seen = ", ".join(names) or "none that has a name"
    owner = type(unwrap(denoiser)).__name__
    if timestep is not None:
        if root(timestep) not in names and not takes_any_keyword(denoiser):
            raise TimestepError(
                f"{owner}.forward has no argument {timestep!r} to carry the timestep; its arguments are: {seen}. "
                "Give the name of one of these as timestep='...'."
            )
        return timestep
    for usual in TIMESTEP_NAMES:
        if usual in names:
            return usual
    raise TimestepError(
        f"{owner}.forward has no argument with a usual name for the timestep ({', '.join(TIMESTEP_NAMES[:8])}, "
        f"...); its arguments are: {seen}. If one of them is the timestep, name it: timestep='...' (on the command "
        "line: --timestep NAME). If none is, this model does not change with a timestep and is not a denoiser."
    )


def root(name: str) -> str:
    """The argument that a dotted input name belongs to: ``"added_cond_kwargs.time_ids"`` -> its first part."""
    return name.partition(".")[0]


def within(name: str, argument: str) -> bool:
    """Whether a dotted input name is an argument, or part of it.

    Example:
        >>> within("batch.t", "batch"), within("batch.t", "batch.t"), within("batches", "batch")
        (True, True, False)
    """
    return name == argument or name.startswith(f"{argument}.")


def takes_any_keyword(denoiser: nn.Module) -> bool:
    """Whether the denoiser's forward has ``**kwargs``."""
    kinds = {parameter.kind for parameter in forward_signature(denoiser).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


def value_of(arguments: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted name among nested arguments; None where there is none."""
    found: Any = arguments
    for part in name.split("."):
        if isinstance(found, list | tuple) and part.isdigit() and int(part) < len(found):
            found = found[int(part)]
        else:
            found = found.get(part) if isinstance(found, Mapping) else getattr(found, part, None)
    return found


def named_leaves(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Leaves of nested arguments with dotted names, in order.

    Dictionaries, lists and tuples are entered; anything else is a leaf.

    Example:
        >>> [name for name, _ in named_leaves({"x": 1, "cond": {"ids": [2, 3]}})]
        ['x', 'cond.ids.0', 'cond.ids.1']
    """
    return _leaves("", inputs)


def _leaves(around: str, values: Mapping[str, Any] | Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        if isinstance(value, Mapping | list | tuple):
            yield from _leaves(f"{around}{key}.", value)
        else:
            yield f"{around}{key}", value


def map_leaves(inputs: Mapping[str, Any], function: Callable[[str, Any], Any]) -> dict[str, Any]:
    """The same nesting with every leaf replaced by ``function(dotted_name, leaf)``."""
    return {key: _map(str(key), value, function) for key, value in inputs.items()}


def _map(name: str, value: Any, function: Callable[[str, Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _map(f"{name}.{key}", item, function) for key, item in value.items()}
    if not isinstance(value, list | tuple):
        return function(name, value)
    items = [_map(f"{name}.{index}", item, function) for index, item in enumerate(value)]
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Every tensor of a module's output: of a tensor, or a tuple, dictionary or dataclass of tensors, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from tensors_of(list(output.values()))
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_of(value)
    elif dataclasses.is_dataclass(output):
        yield from tensors_of([getattr(output, field.name) for field in dataclasses.fields(output)])


def number_to_tensor(inputs: Mapping[str, Any], timestep: str | None) -> dict[str, Any]:
    """``inputs`` with a timestep that is a Python number made a 0-d tensor, so that it can be followed.

    A number would become a constant of the graph, and nothing would seem to depend on the timestep.
    """

    def tensor(name: str, value: Any) -> Any:
        if name != timestep or isinstance(value, bool) or not isinstance(value, int | float):
            return value
        return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float32)

    return map_leaves(inputs, tensor)


def check_inputs(denoiser: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise `TraceError` unless ``inputs`` are keyword arguments of the denoiser with a tensor among them."""
    owner = type(unwrap(denoiser)).__name__
    names = argument_names(denoiser)
    unknown = [key for key in inputs if names and key not in names]
    if unknown and not takes_any_keyword(denoiser):
        raise TraceError(
            f"{owner}.forward has no argument {unknown[0]!r}, which the example inputs name; its arguments are: "
            f"{', '.join(names)}. Example inputs are a dictionary of the denoiser's own keyword arguments."
        )
    if not any(isinstance(value, Tensor) for _, value in named_leaves(inputs)):
        raise TraceError(
            f"the example inputs for {owner} hold no tensor, so nothing can be followed through it. Give a "
            f"dictionary with the tensors of one call, for example the sample and the timestep; the arguments "
            f"of its forward are: {', '.join(names)}."
        )
