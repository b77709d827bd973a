"""The inputs of layers, streamed timestep by timestep while the full-precision denoiser repeats recorded calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from dq_plugins.calibration import CalibrationSet
from dq_plugins.calibration.modes import evaluating
from dq_plugins.errors import CalibrationError, close_matches
from dq_plugins.graph.arguments import unwrap

Receive = Callable[[str, Tensor], None]


def stream_inputs(
    denoiser: nn.Module,
    calibration: CalibrationSet,
    layers: Sequence[str],
    receive: Receive,
    *,
    timesteps: Sequence[float] | None = None,
    progress: bool = False,
) -> Iterator[float]:
    """Repeat the recorded calls of each timestep, and hand every input of every layer to ``receive``.

    The denoiser runs in eval mode without gradients, and only while the next timestep is asked for; its mode and
    hooks are restored each time.

    Args:
        denoiser: the full-precision denoiser.
        calibration: calls recorded from it.
        layers: fully qualified names.
        receive: called with a layer's name and its first tensor argument.
        timesteps: which timesteps, in which order; all, ascending, by default.
        progress: show a progress bar.

    Yields:
        Each timestep, when all its calls have run.

    Raises:
        CalibrationError: a layer does not exist, was not reached, or its input is not finite.
    """
    denoiser = unwrap(denoiser)
    modules = _find(denoiser, layers)
    selected = calibration.timesteps if timesteps is None else timesteps
    for t in tqdm(selected, desc="observing", unit="timestep", disable=not progress, leave=False):
        reached: set[str] = set()
        with _hooked(modules, _named_receive(receive, reached, t)), evaluating(denoiser):
            for call in calibration.calls(t):
                call.run(denoiser)
        missing = [name for name in modules if name not in reached]
        if missing:
            raise CalibrationError(
                f"layer {missing[0]!r} ({len(missing)} such) did not run at timestep {t:g}, so nothing is known "
                "about its inputs there. Leave it in full precision, or record calls that reach it."
            )
        yield t


def _find(denoiser: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
    modules = dict(denoiser.named_modules(remove_duplicate=False))
    for name in layers:
        if name not in modules:
            raise CalibrationError(f"{type(denoiser).__name__} has no layer {name!r}{close_matches(name, modules)}")
    return {name: modules[name] for name in layers}


def _named_receive(receive: Receive, reached: set[str], timestep: float) -> Receive:
    def named(name: str, x: Tensor) -> None:
        reached.add(name)
        try:
            receive(name, x)
        except CalibrationError as error:
            raise CalibrationError(f"input of layer {name!r} at timestep {timestep:g}: {error}") from error

    return named


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], receive: Receive) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        def pre_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is None:
                raise CalibrationError(f"layer {name!r} was called without a tensor")
            receive(name, x)

        return pre_hook

    # Before any other hook: one that quantizes the input must not change what is observed.
    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True, prepend=True) for n, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
