"""Balanced input channels and bias corrections in Brevitas models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchao_models
from brevitas.graph.calibrate import calibration_mode
from brevitas.graph.quantize import layerwise_quantize
from dq_brevitas import (
    BrevitasAdapter,
    attach_timesteps,
    bake_weights,
    export_onnx_qcdq,
    export_torch,
    float_model,
    freeze_timestep_group,
    inference_mode,
    layer_map,
    load,
    plan_from_model,
    save,
)
from plans import all_corrected
from stock_brevitas import run_gptq
from torch import nn
from torchao_models import corrected_plan

from dq_plugins.errors import DQError, PlanError, TimestepError
from dq_plugins.plan import BiasCorrection, LayerPlan, QuantPlan, Reason, WeightQuant
from dq_plugins.quantized.layer_transform import transform_of, transformed_weight
from dq_plugins.quantized.simulate import SimulateAdapter
from dq_plugins.testing.denoiser import TIMESTEPS, TinyDenoiser
from dq_plugins.testing.plans import handmade_plan
from dq_plugins.timesteps import TimestepContext, TimestepGroups


def plan_of(*, balance: bool = True, correction: bool = True) -> QuantPlan:
    """Learned codes, weights alone, inputs alone, one row of corrections: a layer of each; the rest as usual."""
    model = TinyDenoiser()
    plan = all_corrected(handmade_plan(model), model)
    learned, weights, inputs, one, *_ = plan.layers
    layer = plan.layers[learned]
    codes = layer.weight.quantize(model.get_submodule(learned).weight)
    plan.layers[learned].weight = replace(layer.weight, codes=(codes + 1).clamp(-128, 127))
    kept = {"unquantized_reason": Reason("an exercise")}
    plan.layers[weights] = replace(plan.layers[weights], activation=None, **kept)
    plan.layers[inputs] = replace(plan.layers[inputs], weight=None, **kept)
    plan.layers[one].bias_correction = BiasCorrection(plan.layers[one].bias_correction.values[:1])
    for layer in plan.layers.values():
        layer.balance = layer.balance if balance else None
        layer.bias_correction = layer.bias_correction if correction else None
    return plan.validate()


@pytest.fixture
def plan():
    return plan_of()


@pytest.fixture
def model(plan):
    return BrevitasAdapter().apply(TinyDenoiser(), plan)


def assert_same(a: nn.Module, b: nn.Module, calls, tolerance: float = 0.0) -> None:
    for call in [*calls, together(calls)]:
        with torch.no_grad():
            torch.testing.assert_close(a(**call), b(**call), rtol=tolerance, atol=tolerance)


def together(calls):
    return {key: torch.cat([call[key][:1] for call in calls]) for key in calls[0]}


def test_it_is_the_simulation_bit_for_bit(model, plan, calls):
    simulated = SimulateAdapter().apply(TinyDenoiser(), plan)
    assert_same(model, simulated, calls)


def test_half_precision_agrees_with_the_simulation():
    plan = corrected_plan(torchao_models.build().bfloat16())
    model = BrevitasAdapter().apply(torchao_models.build().bfloat16(), plan)
    simulated = SimulateAdapter().apply(torchao_models.build().bfloat16(), plan)
    for t in (*torchao_models.TIMESTEPS, [100.0, 900.0]):
        x = torch.randn(2, 4, 8, 8).bfloat16()
        with torch.no_grad():
            expected, found = (each(x, torch.tensor(t)) for each in (simulated, model))
        assert found.dtype == torch.bfloat16
        assert (found - expected).float().norm() < 0.02 * expected.float().norm()


def test_the_map_alone_is_enough_and_waits_for_its_timesteps(plan, model, calls):
    mapped = layerwise_quantize(TinyDenoiser(), compute_layer_map=layer_map(plan)).eval()
    with pytest.raises(TimestepError, match="attach_timesteps"):
        mapped(**calls[0])
    attach_timesteps(mapped, plan.groups)
    assert_same(mapped, model, calls)


def test_groups_of_another_number_do_not_fit_the_table(model):
    with pytest.raises(TimestepError, match="a bias correction has 5 rows for timestep groups 'all'"):
        model.up.output_quant.bind(TimestepContext({"all": TimestepGroups((500.0,))}))


def test_float_weights_stay_where_rounding_was_not_learned(model, plan):
    for name, layer in plan.layers.items():
        same = torch.equal(model.get_submodule(name).weight, TinyDenoiser().get_submodule(name).weight)
        assert same == (layer.weight is None or layer.weight.codes is None), name


def test_metadata_of_a_weight_says_its_integers(model, plan):
    for name, layer in plan.layers.items():
        if layer.weight is not None:
            quantized = model.get_submodule(name).quant_weight()
            before = TinyDenoiser().get_submodule(name)
            codes = layer.weight.quantize(transformed_weight(before, transform_of(layer)))
            assert torch.equal(quantized.int().long(), codes.long()), name


def test_a_plan_is_read_back_and_runs_the_same(model, plan, calls):
    read = plan_from_model(model, plan.schedule, base=plan)
    for name, layer in plan.layers.items():
        found = read.layers[name]
        assert torch.equal(found.balance, layer.balance), name
        assert torch.equal(found.bias_correction.values, layer.bias_correction.values)
        assert found.bias_correction.groups == layer.bias_correction.groups
        if layer.weight is not None:
            torch.testing.assert_close(found.weight.scale, layer.weight.scale)
    simulated = SimulateAdapter().apply(float_model(model), read)
    assert_same(simulated, model, calls, 1e-5)


def test_calibration_and_disabled_quantizers_leave_full_precision(model, plan, calls):
    reference = TinyDenoiser()
    for module in model.modules():
        if hasattr(module, "disable_quant"):
            module.disable_quant = True
    for name, layer in plan.layers.items():  # learned codes are in the weights
        if layer.weight is not None and layer.weight.codes is not None:
            reference.get_submodule(name).weight.data = model.get_submodule(name).weight.data
    assert_same(model, reference, calls)


def test_stock_calibration_runs(model, calls):
    before = [model(**call) for call in calls]
    with torch.no_grad(), calibration_mode(model):
        for call in calls:
            model(**call)
    assert all(torch.equal(a, model.eval()(**call)) for a, call in zip(before, calls, strict=True))


def test_what_was_saved_is_loaded_bit_for_bit(model, plan, calls, tmp_path):
    with torch.no_grad():
        model.up.input_quant.tensor_quantizer.scaling_impl.value.mul_(1.5)
        model.up.output_quant.correction.values += 1
    save(model, tmp_path)
    loaded = load(BrevitasAdapter().apply(TinyDenoiser(), plan), tmp_path)
    assert_same(loaded, model, calls)


def test_every_scale_trains(model, calls):
    model.train()
    model(**together(calls)).square().mean().backward()
    scales = {n: p for n, p in model.named_parameters() if n.endswith("scaling_impl.value")}
    assert all(p.grad is not None and bool(p.grad.any()) for p in scales.values())
    assert bool(model.up.weight.grad.any())


def test_baked_weights_compute_the_same(model, calls):
    expected = [model(**call) for call in calls]
    bake_weights(model)
    for call, e in zip(calls, expected, strict=True):
        torch.testing.assert_close(model(**call), e, rtol=1e-5, atol=1e-5)


def test_gptq_lowers_the_error(calls):
    plan = plan_of(correction=False)
    full = [TinyDenoiser()(**call) for call in calls]
    for name, layer in plan.layers.items():
        if layer.weight is not None:
            layer.weight = WeightQuant(3, layer.weight.scale * 42)
            assert layer.balance is not None, name
    model = BrevitasAdapter().apply(TinyDenoiser(), plan)

    def error() -> float:
        with torch.no_grad():
            return sum(float((model(**call) - f).square().sum()) for call, f in zip(calls, full, strict=True))

    before = error()
    run_gptq(model, calls)
    assert error() < 0.9 * before


def test_inference_mode_and_torch_export_compute_the_same(model, calls):
    expected = [model(**call) for call in calls]
    with torch.no_grad(), inference_mode(model):
        model(**calls[0])
        for call, e in zip(calls, expected, strict=True):
            torch.testing.assert_close(model(**call), e, rtol=1e-5, atol=1e-5)
    program = export_torch(model, kwargs=calls[0]).module()
    for call, e in zip(calls, expected, strict=True):
        torch.testing.assert_close(program(**call), e, rtol=1e-5, atol=1e-5)


def test_exports_that_have_no_factors_say_so(model, calls):
    with pytest.raises(DQError, match="'channel-balance'"):
        export_onnx_qcdq(model, kwargs=calls[0])
    with pytest.raises(DQError, match="'channel-balance'"):
        freeze_timestep_group(model, 0)


def test_a_frozen_group_has_its_row_in_the_bias(calls):
    plan = plan_of(balance=False)
    model = BrevitasAdapter().apply(TinyDenoiser(), plan)
    for group, t in enumerate(sorted(TIMESTEPS)):
        frozen = freeze_timestep_group(model, group)
        call = {**calls[0], "timestep": torch.tensor([float(t)])}
        torch.testing.assert_close(frozen(**call), model(**call), rtol=1e-5, atol=1e-5)


def test_a_binary_weight_is_not_balanced(plan):
    weight = TinyDenoiser().up.weight.detach()
    plan.layers["up"].weight = WeightQuant(1, weight.abs().flatten(1).mean(1), scheme="binary")
    with pytest.raises(PlanError, match="'up' has a binary weight and balanced input channels"):
        BrevitasAdapter().apply(TinyDenoiser(), plan)


def test_kept_layers_have_neither(model, plan):
    plan.layers["up"] = LayerPlan("linear", unquantized_reason=Reason("kept"))
    assert type(BrevitasAdapter().apply(TinyDenoiser(), plan).up) is nn.Linear
