"""From a trained model to a plan, which any adapter runs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dq_plugins.affine import per_row
from dq_plugins.errors import DQError
from dq_plugins.hashing import weights_hash
from dq_plugins.plan import ActivationQuant, QuantPlan, Reason, WeightQuant
from dq_plugins.quantized.binarizers import BinaryBasis, EvolvableBasis
from dq_plugins.quantized.learned_step import LearnedStepActivation
from dq_plugins.quantized.signs import sign
from dq_plugins.quantized.trained_layers import QuantizedTraining, make_plain, trained_layers
from dq_plugins.timesteps import TimestepGroups

GROUPS = "static"
"""Name of the one timestep group of learned activation steps, which serve every timestep."""

FLOAT_INPUTS = Reason("trained with inputs in floating point", "weight-only")

TINY = torch.finfo(torch.float32).tiny


def binary_parameters(weight: Tensor, quantizer: BinaryBasis | EvolvableBasis) -> tuple[Tensor, Tensor]:
    """Signs (int8, the weight's shape) and positive scales ``[O]`` whose product is the quantized weight.

    A learned scale that went negative turns the signs of its channel around; one at zero becomes the smallest
    positive number, because a stored scale is positive.

    Raises:
        DQError: the second basis is still there.
    """
    if isinstance(quantizer, EvolvableBasis) and not quantizer.evolved:
        raise DQError(
            "a layer still has two bases, which one bit a weight cannot hold: make the transition first "
            "(dq_plugins.passes.binarization.evolve(model), or a callback with evolve_at), and train on after it"
        )
    scale = quantizer.scale.detach().float()
    signs = sign(weight.detach()) * per_row(sign(scale), weight)
    return signs.to(torch.int8), scale.abs().clamp_min(TINY)


def started_scale(quantizer: LearnedStepActivation) -> Tensor:
    """Scale of an activation quantizer; an error if no batch has set it."""
    if not bool(quantizer.started):
        raise DQError("its activation step was never set: run the model once first")
    return quantizer.scale()


def _checked(model: nn.Module) -> dict[str, QuantizedTraining]:
    layers = trained_layers(model)
    if not layers:
        raise DQError(f"this {type(model).__name__} has no layers that train quantized; see train_quantized")
    return layers


def planned_weight(layer: QuantizedTraining) -> WeightQuant:
    """The weight quantizer of a trained layer as a plan holds it (for signs already turned by `_turn_signs`)."""
    quantizer = layer.weight_quantizer
    if isinstance(quantizer, BinaryBasis | EvolvableBasis):
        _, scale = binary_parameters(layer.weight, quantizer)
        return WeightQuant(1, scale.cpu(), scheme="binary")
    return WeightQuant(quantizer.bits, quantizer.scale().detach().float().cpu())


def planned_activation(layer: QuantizedTraining) -> ActivationQuant | None:
    """The input quantizer of a trained layer as a plan holds it: one timestep group; None for floating point."""
    quantizer = layer.input_quantizer
    if not isinstance(quantizer, LearnedStepActivation):
        return None
    scale = started_scale(quantizer).reshape(1).cpu()
    return ActivationQuant(quantizer.bits, GROUPS, scale, torch.zeros(1, dtype=torch.int32))


@torch.no_grad()
def _turn_signs(layer: QuantizedTraining) -> None:
    """Make a binary layer's scales positive by turning the weights of channels that learned a negative one."""
    quantizer = layer.weight_quantizer
    if isinstance(quantizer, BinaryBasis | EvolvableBasis):
        signs, _ = binary_parameters(layer.weight, quantizer)
        layer.weight.copy_(layer.weight.abs() * signs)  # a zero keeps its side only as +0
        layer.weight[(layer.weight == 0) & (signs < 0)] = -TINY
        quantizer.scale.abs_()


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
    layers = _checked(model)
    result = copy.deepcopy(plan)
    for name, layer in layers.items():
        try:
            entry, activation = result.layer(name), planned_activation(layer)
            entry.weight, entry.activation = planned_weight(layer), activation
        except DQError as error:
            raise type(error)(f"layer {name!r} cannot become part of a plan: {error}") from error
        entry.unquantized_reason = None if activation else FLOAT_INPUTS
    for layer in layers.values():
        _turn_signs(layer)
        make_plain(layer)
    result.groups[GROUPS] = TimestepGroups()
    result.model_hash = weights_hash(model)
    return result.validate()
