"""The inputs of layers, streamed timestep by timestep while the full-precision denoiser repeats recorded calls."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn
from tqdm.auto import tqdm

from dq_plugins.calibration import CalibrationSet
from dq_plugins.compiled import evaluating, unwrap
from dq_plugins.errors import CalibrationError, close_matches
from dq_plugins.hooks import hooked
from dq_plugins.layer_kinds import LayerKind, kind_of
from dq_plugins.timesteps import RowOrder, by_sample_or_token, fit_to_input

Receive = Callable[[str, Tensor, float], None]


class Transform(Protocol):
    """What happens to a layer's input before it is quantized, see `dq_plugins.quantized.layer_transform`."""

    def of_input(self, kind: LayerKind, x: Tensor) -> Tensor:
        """The transformed input of a layer of this kind."""


Transforms = Mapping[str, Transform]


def stream_inputs(
    denoiser: nn.Module,
    calibration: CalibrationSet,
    layers: Sequence[str],
    receive: Receive,
    *,
    timesteps: Sequence[float] | None = None,
    transforms: Transforms = MappingProxyType({}),
    rows: Mapping[str, RowOrder | None] = MappingProxyType({}),
    progress: bool = False,
) -> Iterator[float]:
    """Repeat the recorded calls of each timestep, and hand every input of every layer to ``receive``.

    The denoiser runs in eval mode without gradients, and only while the next timestep is asked for; its mode and
    hooks are restored each time.

    Args:
        denoiser: the full-precision denoiser.
        calibration: calls recorded from it.
        layers: fully qualified names.
        receive: called with a layer's name, its first tensor argument, and the timestep. Where tokens of a call have
            different timesteps, with those of the tokens that have this one, ``[n, C]``, if there are any.
        timesteps: which timesteps, in which order; all, ascending, by default.
        transforms: of the inputs of some layers; what is handed out is transformed.
        rows: where the samples of a call are in the inputs of layers.
        progress: show a progress bar.

    Yields:
        Each timestep, when all its calls have run.

    Raises:
        CalibrationError: a layer does not exist, was not reached at any of all timesteps, or its input is not finite.
    """
    denoiser = unwrap(denoiser)
    modules = _find(denoiser, layers)
    transforming = {
        n: partial(transforms[n].of_input, kind) for n, m in modules.items() if n in transforms and (kind := kind_of(m))
    }
    selected = calibration.timesteps if timesteps is None else timesteps
    reached: set[str] = set()
    for t in tqdm(selected, desc="observing", unit="timestep", disable=not progress, leave=False):
        for call in calibration.calls(t):
            before = _receiver(receive, reached, t, transforming, _rows_at(t, call.timestep, modules, rows))
            # before any other hook: one that quantizes the input must not change what is observed
            with hooked(modules, before=before, first=True), evaluating(denoiser):
                call.run(denoiser)
        yield t
    if set(selected) >= set(calibration.timesteps):
        require_reached(modules, reached)


def require_reached(layers: Iterable[str], reached: Container[str]) -> None:
    """Raise `CalibrationError` unless every layer ran at some timestep: a forward may run others early than late."""
    missing = [name for name in layers if name not in reached]
    if missing:
        raise CalibrationError(
            f"layer {missing[0]!r} ({len(missing)} such) did not run in any recorded call, so nothing is known about "
            "its inputs. Leave it in full precision, or record calls that reach it."
        )


def _find(denoiser: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
    modules = dict(denoiser.named_modules(remove_duplicate=False))
    for name in layers:
        if name not in modules:
            raise CalibrationError(f"{type(denoiser).__name__} has no layer {name!r}{close_matches(name, modules)}")
    return {name: modules[name] for name in layers}


def _receiver(
    receive: Receive,
    reached: set[str],
    timestep: float,
    transforming: Mapping[str, Callable[[Tensor], Tensor]],
    rows: Callable[[str, Tensor], Tensor],
) -> Callable[..., None]:
    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reached.add(name)
        x = first_argument(name, args, kwargs)
        x = rows(name, transforming[name](x) if name in transforming else x)
        if x.numel():
            receive(name, x, timestep)

    return before


def _rows_at(
    timestep: float, of_call: Tensor, modules: Mapping[str, nn.Module], orders: Mapping[str, RowOrder | None]
) -> Callable[[str, Tensor], Tensor]:
    """What of a layer's input is at a timestep, where tokens of the call have different ones."""
    tokens = by_sample_or_token(of_call)
    if tokens.dim() < 2 or bool((tokens == timestep).all()):
        return lambda _, x: x

    def rows(name: str, x: Tensor) -> Tensor:
        kind = kind_of(modules[name])
        return x[(fit_to_input(tokens, x, kind.spatial if kind else 0, orders.get(name)) == timestep).to(x.device)]

    return rows


@contextmanager
def located(layer: str, timestep: float) -> Iterator[None]:
    """Errors about a layer's input say which layer and which timestep."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(f"input of layer {layer!r} at timestep {timestep:g}: {error}") from error


def first_argument(layer: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor that a layer was called with: its input."""
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if x is None:
        raise CalibrationError(f"layer {layer!r} was called without a tensor")
    return x
