"""A small plan that uses every field, and any plan with balanced channels and bias corrections."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from dq_plugins.affine import integer_range
from dq_plugins.plan import (
    ActivationQuant,
    BiasCorrection,
    BinaryTraining,
    CalibrationCalls,
    EstimateCheck,
    LayerPlan,
    MeasuredSensitivity,
    OutlierRows,
    PassRecord,
    QuantPlan,
    Reason,
    Section,
    TabulatedBlock,
    TabulatedOutput,
    WeightQuant,
)
from dq_plugins.quantized.layer_transform import LayerTransform, transformed_weight
from dq_plugins.timesteps import Schedule, TimestepGroups


def example_plan(seed: int = 0) -> QuantPlan:
    g = torch.Generator().manual_seed(seed)
    weight = WeightQuant(
        4, torch.rand(3, generator=g) + 0.1, codes=torch.randint(-8, 8, (3, 5), generator=g).to(torch.int8)
    )
    activation = ActivationQuant(8, "all", torch.tensor([0.1, 0.2]), torch.tensor([0, 3], dtype=torch.int32))
    return QuantPlan(
        model="Net",
        model_hash="0" * 64,
        timestep_argument="timestep",
        schedule=Schedule((900.0, 100.0)),
        groups={"all": TimestepGroups((500.0,), low=0.0)},
        layers={
            "a": LayerPlan(
                "linear",
                frozenset({"first"}),
                weight,
                activation,
                None,
                balance=torch.rand(5, generator=g) + 0.5,
                bias_correction=BiasCorrection(torch.randn(2, 3, generator=g), "all"),
            ),
            "b": LayerPlan("conv2d", unquantized_reason=Reason("it is tiny")),
        },
        shared_rows={"all": (0, 1)},
        calibration_calls=CalibrationCalls((100.0, 900.0), (2, 3)),
        sensitivity=MeasuredSensitivity(
            (3, 4),
            (8,),
            noise={"a": {"weight": {3: 0.2, 4: 0.1}, "activation": {8: 0.01}}},
            check=EstimateCheck(2, None, {"weight@4": 1.1}, 1.2),
            calls=8.0,
        ),
        learned_layers=frozenset({"a"}),
        learned_ranges=frozenset({"a"}),
        temporal_table=TabulatedBlock(
            (100.0, 900.0), {"b": TabulatedOutput(torch.ones(2, 4, dtype=torch.int8), torch.ones(2))}
        ),
        outlier_rows={"a": OutlierRows((0,), torch.randn(1, 5, generator=g), torch.randn(1, 3, generator=g))},
        binary_training=BinaryTraining(("a",), (), ("block",)),
        sections={"curve": Section({"error": [3.0, 1.0]}, {"x": torch.arange(3)})},
        passes=[PassRecord("weight-ranges", {"bits": 4})],
        recipe="default",
        seed=seed,
    )


def corrected(plan: LayerPlan, layer: nn.Module, *, groups: str | None = "all", seed: int = 0) -> LayerPlan:
    """The same plan with uneven input channels balanced, and a bias correction for every timestep group."""
    assert plan.weight is not None
    g = torch.Generator().manual_seed(seed)
    inputs, outputs = layer.weight.shape[1] * getattr(layer, "groups", 1), layer.weight.shape[0]
    balance = torch.exp(torch.randn(inputs, generator=g))
    largest = transformed_weight(layer, LayerTransform(balance)).detach().flatten(1).abs().amax(1).float()
    weight = replace(plan.weight, scale=largest / max(integer_range(plan.weight.bits)[1], 1))
    by_group = groups is not None and plan.activation is not None
    values = torch.randn(len(plan.activation.scale) if by_group else 1, outputs, generator=g)
    correction = BiasCorrection(values, groups if by_group else None)
    return replace(plan, weight=weight, balance=balance, bias_correction=correction)


def all_corrected(plan: QuantPlan, model: nn.Module) -> QuantPlan:
    """``plan``, each quantized layer of it `corrected`, in place."""
    for seed, (name, layer) in enumerate(plan.layers.items()):
        if layer.quantized:
            plan.layers[name] = corrected(layer, model.get_submodule(name), seed=seed)
    return plan
