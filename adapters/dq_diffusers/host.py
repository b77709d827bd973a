"""diffusers itself, imported without the messages that its import draws from other libraries.

Importing a model of diffusers 0.42 with torchao 0.18 installed reports GPU kernels that fail to load on other machines,
tensor classes that moved, and a deprecated registration. None of it concerns a model that is built or sampled here.
"""

from __future__ import annotations

import logging
from typing import Any

from dq_plugins.quiet import loggers_at

NOISY = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


def diffusers_attribute(name: str) -> Any:
    """An attribute of the package diffusers, which it imports at first use; None where it has none of that name."""
    with loggers_at(logging.ERROR, NOISY):
        import diffusers

        return getattr(diffusers, name, None)
