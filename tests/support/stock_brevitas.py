"""Brevitas' own methods, run on a few calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from brevitas.graph.gptq import gptq_mode
from torch import nn


def run_gptq(model: nn.Module, calls: Sequence[dict[str, Any]]) -> nn.Module:
    """Brevitas' GPTQ, layer by layer; the model, changed in place."""
    with torch.no_grad(), gptq_mode(model, create_weight_orig=False) as gptq:
        for _ in range(gptq.num_layers):
            for call in calls:
                gptq.model(**call)
            gptq.update()
    return model
