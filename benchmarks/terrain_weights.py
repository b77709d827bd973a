"""Weights of the terrain denoiser: from a file, or from the package on PyPI that publishes them.

They come in the wheel of adaptive-terrain-diffusion 0.4.2 (39 MB), MIT licence, copyright Youwei Yu; the architecture
follows OpenAI's consistency models, MIT licence. The environment variable ``DQ_TERRAIN_WEIGHTS`` names a file instead:
the wheel, its ``.onnx``, or the parameters in a ``.safetensors``. What was read from a wheel is kept in the cache
folder (``XDG_CACHE_HOME`` or ``~/.cache``), so it is downloaded once; reading it needs the package onnx.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from dq_plugins.atomic import write_atomically
from dq_plugins.errors import DQError

PACKAGE, FILE = (
    "adaptive-terrain-diffusion==0.4.2",
    "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx",
)
SHA256 = "dd803be2c98d764e4e64db18c631eef46c210282b398c4dd080f4cda3fa7c84d"
PREFIX = "network."


def terrain_weights(norms: Sequence[str]) -> dict[str, Tensor]:
    """Every parameter of the network, by name.

    Args:
        norms: prefixes of the names of the group norms, in the order in which they run. The exporter took their
            parameters for constants and left their names out.
    """
    given = os.environ.get("DQ_TERRAIN_WEIGHTS")
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dq-plugins" / "terrain.safetensors"
    path = Path(given) if given else kept
    if not given and not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, save(_published(norms)))
    if path.suffix == ".safetensors":
        return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    if path.suffix == ".whl":
        return _from_onnx(zipfile.ZipFile(path).read(FILE), norms)
    if path.suffix == ".onnx":
        return _from_onnx(path.read_bytes(), norms)
    raise DQError(f"DQ_TERRAIN_WEIGHTS names {str(path)!r}; it takes a .whl, an .onnx or a .safetensors.")


def _published(norms: Sequence[str]) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        if subprocess.run(command).returncode:
            raise DQError(f"could not download {PACKAGE}; name a copy of its wheel in DQ_TERRAIN_WEIGHTS.")
        (wheel,) = Path(folder).glob("*.whl")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
            raise DQError(f"{wheel.name} from the package index is not the file that was measured with.")
        return _from_onnx(zipfile.ZipFile(wheel).read(FILE), norms)


def _from_onnx(data: bytes, norms: Sequence[str]) -> dict[str, Tensor]:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(data).graph
    values: dict[str, Any] = {
        each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer
    }
    found = {name.removeprefix(PREFIX): value for name, value in values.items() if name.startswith(PREFIX)}
    reader = {name: node for node in graph.node for name in node.input}
    normalised = [node for node in graph.node if node.op_type == "InstanceNormalization"]
    if len(normalised) != len(norms):
        raise DQError(f"the ONNX file has {len(normalised)} group norms, the network {len(norms)}.")
    for prefix, node in zip(norms, normalised, strict=True):
        # a group norm is exported as an instance norm of groups, a reshape, a product and a sum
        scale = reader[reader[node.output[0]].output[0]]
        shift = reader[scale.output[0]]
        for parameter, operation in (("weight", scale), ("bias", shift)):
            (constant,) = [values[name] for name in operation.input if name in values]
            found[prefix + parameter] = constant.flatten()
    return found
