"""The student of a reconstruction: the denoiser with the weights that a plan has so far."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from dq_plugins.plan import QuantPlan


def planned_student(denoiser: nn.Module, plan: QuantPlan) -> nn.Module:
    """A copy of the denoiser that computes with the plan's weights and full-precision activations."""
    student = copy.deepcopy(denoiser)
    for name, layer in plan.layers.items():
        if layer.weight is not None:
            module = student.get_submodule(name)
            assert isinstance(module.weight, Tensor)
            module.weight = nn.Parameter(layer.weight.fake_quantize(module.weight), requires_grad=False)
    return student
