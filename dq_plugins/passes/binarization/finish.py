"""From a trained model to a plan, which any adapter runs."""

from __future__ import annotations

import copy

import torch
from torch import nn

from dq_plugins.affine import per_row
from dq_plugins.errors import DQError
from dq_plugins.hashing import weights_hash
from dq_plugins.plan import ActivationQuant, QuantPlan, Reason, WeightQuant
from dq_plugins.quantized.binarizers import BinaryBasis
from dq_plugins.quantized.learned_step import LearnedStepActivation, LearnedStepWeight
from dq_plugins.quantized.trained_layers import QuantizedTraining, make_plain, trained_layers
from dq_plugins.timesteps import TimestepGroups

GROUPS = "static"
"""Name of the one timestep group of learned activation steps, which serve every timestep."""

FLOAT_INPUTS = Reason("trained with inputs in floating point", "weight-only")

TINY = torch.finfo(torch.float32).tiny


def _planned_weight(layer: QuantizedTraining) -> WeightQuant:
    """As a plan holds it; a scale at zero becomes the smallest positive number, because a stored scale is positive."""
    quantizer = layer.weight_quantizer
    if isinstance(quantizer, LearnedStepWeight):
        return WeightQuant(quantizer.bits, quantizer.scale().cpu())
    if not quantizer.evolved:
        raise DQError(
            "a layer still has two bases, which one bit a weight cannot hold: make the transition first "
            "(dq_plugins.passes.binarization.evolve(model), or a callback with evolve_at), and train on after it"
        )
    return WeightQuant(1, quantizer.scale.detach().float().abs().clamp_min(TINY).cpu(), scheme="binary")


def _planned_activation(layer: QuantizedTraining) -> ActivationQuant | None:
    quantizer = layer.input_quantizer
    if not isinstance(quantizer, LearnedStepActivation):
        return None
    if not bool(quantizer.started):
        raise DQError("its activation step was never set: run the model once first")
    return ActivationQuant(
        quantizer.bits, GROUPS, quantizer.scale().reshape(1).cpu(), torch.zeros(1, dtype=torch.int32)
    )


@torch.no_grad()
def _turn_signs(layer: QuantizedTraining) -> None:
    """Make a binary layer's scales positive by turning the weights of channels that learned a negative one."""
    quantizer, weight = layer.weight_quantizer, layer.weight
    if isinstance(quantizer, BinaryBasis):
        negative = per_row(quantizer.scale < 0, weight)
        turned = torch.where(weight == 0, -torch.finfo(weight.dtype).tiny, -weight)  # zero counts as +1
        weight.copy_(torch.where(negative, turned, weight))


def to_plan(model: nn.Module, plan: QuantPlan) -> QuantPlan:
    """Make a trained model plain again, in place, and write what it learned into a plan.

    Any adapter can then apply the plan to the model: ``dq.apply(model, plan, backend="torchao")`` runs it in integers.

    Args:
        model: trained, after the transition. Becomes an ordinary denoiser with the latent weights.
        plan: of the denoiser before training, for its layers, schedule and timestep argument; stays as it is.

    Returns:
        The plan of the plain model.

    Raises:
        DQError: a layer still has two bases, or the model has no trained layers; nothing has been changed then.
        PlanError: the plan does not list a trained layer.
    """
    layers = trained_layers(model)
    if not layers:
        raise DQError(f"this {type(model).__name__} has no layers that train quantized; see train_quantized")
    result = copy.deepcopy(plan)
    for name, layer in layers.items():
        try:
            entry = result.layer(name)
            entry.weight, entry.activation = _planned_weight(layer), _planned_activation(layer)
        except DQError as error:
            raise type(error)(f"layer {name!r} cannot become part of a plan: {error}") from error
        entry.unquantized_reason = None if entry.activation else FLOAT_INPUTS
    for layer in layers.values():
        _turn_signs(layer)
        make_plain(layer)
    result.groups[GROUPS] = TimestepGroups()
    result.model_hash = weights_hash(model)
    return result.validate()
