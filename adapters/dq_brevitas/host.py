"""The host framework, imported once and quietly.

Brevitas 0.13 warns about two things on import that a user of this package can do nothing about: its own use of its
deprecated ``brevitas.fx``, and an optional kernel package it did not find. Those two messages are silenced, and only
while importing; every other warning passes.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from dq_plugins.errors import DQError, require

require("brevitas", "brevitas", "use dq_brevitas")

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r"brevitas\.fx is deprecated")
    warnings.filterwarnings("ignore", message="fast_hadamard_transform package not found")
    import brevitas.config
    import brevitas.graph  # before any other part: its equalized layers import each other in a circle
    import brevitas.nn

if brevitas.config.JIT_ENABLED:
    raise DQError(
        "BREVITAS_JIT=1 compiles quantizers with TorchScript, which cannot hold the timestep context of dq_brevitas. "
        "Unset BREVITAS_JIT; use dq_brevitas.inference_mode(model) with torch.compile for speed."
    )


def keep_what_is_missing(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load a full-precision checkpoint, which knows nothing of ``module``, where Brevitas is told to (or tells itself).

    For ``register_load_state_dict_pre_hook``.
    """
    if brevitas.config.IGNORE_MISSING_KEYS:
        for key, value in module.state_dict().items():
            state.setdefault(prefix + key, value)
