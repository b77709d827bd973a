"""Run ``torch.export`` on a copy of a denoiser without its weights, in the ways that different code styles need."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from dq_plugins.compiled import unwrap
from dq_plugins.errors import TraceError
from dq_plugins.graph.arguments import map_leaves, named_leaves, tensors_of
from dq_plugins.graph.meta_copy import empty_on, meta_copy
from dq_plugins.graph.traced_program import Placeholder, Program, quiet_tracing, without_prefix

Exported = tuple[ExportedProgram, tuple[str, ...]]
"""A traced denoiser: the program and the dotted names of its tensor inputs, in order."""

# Meta tensors come first: they are the plainest. Code that asks the device for its autocast settings does not know
# the meta device, and runs on fake CPU tensors instead. Code that reads Python values out of tensors, or builds
# modules as it goes, may only pass the bytecode tracer (strict).
_ATTEMPTS = (
    ("on meta tensors", "meta", False),
    ("on fake CPU tensors", "cpu", False),
    ("on meta tensors, strict", "meta", True),
)


def export_denoiser(denoiser: nn.Module, inputs: Mapping[str, Any]) -> Exported:
    """Export a denoiser without touching it and without memory for its weights.

    Args:
        denoiser: on any device.
        inputs: keyword arguments of one call; tensors may be nested in dictionaries, lists and tuples.

    Returns:
        The program, whose parameter names start with `PREFIX`, and the names of its inputs.

    Raises:
        TraceError: no way of tracing gets through; the message holds the reason of each.
    """
    failures: list[tuple[str, Exception]] = []
    for how, device, strict in _ATTEMPTS:
        try:
            return _export(unwrap(denoiser), inputs, device, strict)
        except TraceError:
            raise
        except Exception as error:  # torch.export raises whatever the model's code and its own passes raise
            failures.append((how, error))
    raise TraceError(_explain(denoiser, failures)) from failures[0][1]


def _export(denoiser: nn.Module, inputs: Mapping[str, Any], device: str, strict: bool) -> Exported:
    fake = contextlib.nullcontext() if device == "meta" else FakeTensorMode(allow_non_fake_inputs=True)
    allocate = empty_on(device)

    def stand_in(tensor: Tensor) -> Tensor:
        with fake:
            return allocate(tensor)

    call = _Call(meta_copy(denoiser, stand_in), inputs)
    tensors = tuple(stand_in(value) for _, value in named_leaves(inputs) if isinstance(value, Tensor))
    with quiet_tracing(), torch.no_grad():
        program = torch.export.export(call, tensors, strict=strict)
    return program, call.names


def program_of(exported: Exported) -> Program:
    """An exported program with its placeholders named."""
    program, names = exported
    inputs = iter(names)
    placeholders = {}
    nodes = (node for node in program.graph.nodes if node.op == "placeholder")
    for node, spec in zip(nodes, program.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.PARAMETER:
            placeholders[node] = Placeholder("parameter", without_prefix(str(spec.target)))
        elif spec.kind is InputKind.USER_INPUT:
            placeholders[node] = Placeholder("input", next(inputs))
        elif isinstance(node.meta.get("val"), Tensor):
            placeholders[node] = Placeholder("constant", without_prefix(spec.target or node.name))
    return Program(program.graph, program.graph_module, placeholders)


class _Call(nn.Module):
    """The denoiser as a function of a flat list of tensors; nested arguments and outputs are packed here."""

    def __init__(self, denoiser: nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.template = map_leaves(inputs, lambda name, value: None if isinstance(value, Tensor) else value)
        self.names = tuple(name for name, value in named_leaves(inputs) if isinstance(value, Tensor))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the denoiser and return the tensors of its output, flattened."""
        given = dict(zip(self.names, tensors, strict=True))
        output = self.denoiser(**map_leaves(self.template, lambda name, value: given.get(name, value)))
        found = tuple(tensors_of(output))
        if not found:
            raise TraceError(
                f"the forward of {type(self.denoiser).__name__} returned {type(output).__name__}, with no tensor in "
                "it that could be the denoised sample. Return a tensor, or a tuple, dictionary or dataclass of tensors."
            )
        return found


def _explain(denoiser: nn.Module, failures: list[tuple[str, Exception]]) -> str:
    reasons = "; ".join(f"{how}: {_first_line(error)}" for how, error in failures)
    return (
        f"{type(unwrap(denoiser)).__name__} cannot be traced by torch.export with these example inputs ({reasons}). "
        "Check first that the denoiser runs on the example inputs. If it does, its forward reads tensor values to "
        "decide what to do (a Python `if`, `.item()`, `.tolist()` or boolean indexing on a tensor); compute "
        f"such values from shapes or pass them as Python arguments.{_place(failures[0][1])}"
    )


def _place(error: Exception) -> str:
    """Where in the denoiser's own code an export stopped, as a sentence."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    if not frames:
        return ""
    last = frames[-1]
    return f" It stopped at {last.filename}:{last.lineno}, in {last.name}: `{last.line}`."


def _first_line(error: Exception) -> str:
    text = str(error).strip() or "no message"
    line = next(line.strip() for line in text.splitlines() if line.strip())
    return f"{type(error).__name__}: {line[:200]}"
