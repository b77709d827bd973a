"""Layers with a range for each token, or each sample, in Brevitas models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchao_models
from brevitas import nn as qnn
from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
from brevitas.graph.quantize import layerwise_quantize
from brevitas.quant.scaled_int import Int32Bias
from dq_brevitas import (
    BrevitasAdapter,
    Int8DynamicActPerTokenFloat,
    Int8DynamicAsymmetricActPerTokenFloat,
    attach_timesteps,
    convert_to_timestep,
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
from torchao_models import GROUPS, corrected_plan

import dq_plugins as dq
from dq_plugins.errors import DQError
from dq_plugins.hashing import weights_hash
from dq_plugins.layer_kinds import LAYER_KINDS
from dq_plugins.plan import ActivationQuant, DynamicActivationQuant, QuantPlan, WeightQuant
from dq_plugins.quantized.input_quantizers import quantize_dynamically
from dq_plugins.quantized.simulate import SimulateAdapter
from dq_plugins.testing.denoiser import TinyDenoiser
from dq_plugins.testing.plans import handmade_plan

BOTH = pytest.mark.parametrize("symmetric", [False, True])


def plan_of(symmetric: bool = True, bits: int = 8, *, corrected: bool = True) -> QuantPlan:
    """Every layer by token or sample, one weight with learned codes; balanced and corrected by group, or not."""
    model = TinyDenoiser()
    plan = handmade_plan(model)
    if corrected:
        plan = all_corrected(plan, model)
    for layer in plan.layers.values():
        if layer.kind in ("linear", "conv2d"):
            layer.activation = DynamicActivationQuant(bits, symmetric, 1.0 if bits == 8 else 0.7)
    up = plan.layers["up"]
    up.weight = replace(up.weight, codes=(up.weight.quantize(model.up.weight) + 1).clamp(-128, 127))
    return plan.validate()


def applied(plan: QuantPlan) -> nn.Module:
    return BrevitasAdapter().apply(TinyDenoiser(), plan)


def together(calls):
    return {key: torch.cat([call[key][:1] for call in calls]) for key in calls[0]}


def assert_same(a: nn.Module, b: nn.Module, calls, tolerance: float = 0.0) -> None:
    for call in [*calls, together(calls)]:
        with torch.no_grad():
            torch.testing.assert_close(a(**call), b(**call), rtol=tolerance, atol=tolerance)


@BOTH
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_it_is_the_simulation_bit_for_bit(bits, corrected, symmetric, calls):
    plan = plan_of(symmetric, bits, corrected=corrected)
    assert_same(applied(plan), SimulateAdapter().apply(TinyDenoiser(), plan), calls)


@pytest.mark.parametrize("injector", [Int8DynamicActPerTokenFloat, Int8DynamicAsymmetricActPerTokenFloat])
def test_by_hand_each_row_has_its_own_range(injector):
    layer = qnn.QuantLinear(24, 10, bias=True, input_quant=injector, input_bit_width=6)
    x = torch.randn(4, 5, 24) * torch.logspace(-4, 3, 20).reshape(4, 5, 1)
    x[0, 0], x[1, 1], x[2, 2] = 0.0, 3.0, x[2, 2].abs()
    found = layer.input_quant(x)
    assert torch.equal(found, quantize_dynamically(x, DynamicActivationQuant(6, injector.symmetric)))
    assert torch.equal(found[3, 4], layer.input_quant(x[3, 4]))
    assert int(layer.input_quant.bit_width()) == 6
    assert all(name.endswith(".code_widths") for name in layer.input_quant.state_dict())  # nothing was calibrated
    with pytest.raises(RuntimeError, match="input-dependant"):
        layer.input_quant.scale()


@pytest.mark.parametrize("injector", [Int8DynamicActPerTokenFloat, Int8DynamicAsymmetricActPerTokenFloat])
def test_by_hand_each_sample_of_a_convolution_has_its_own_range(injector):
    layer = qnn.QuantConv2d(4, 6, 3, input_quant=injector)
    x = torch.randn(3, 4, 5, 6) * torch.tensor([1e-3, 1.0, 1e4]).reshape(3, 1, 1, 1)
    found, quant = layer.input_quant(x), DynamicActivationQuant(8, injector.symmetric)
    assert torch.equal(found, quantize_dynamically(x, quant, kind=LAYER_KINDS["conv2d"]))
    again = qnn.QuantConv2d(4, 6, 3, input_quant=injector)
    again.load_state_dict(layer.state_dict())  # which makes the quantizers anew
    assert torch.equal(again.input_quant(x), found)
    assert torch.equal(layer(x)[:1], layer(x[:1]))


@BOTH
def test_gradients_pass_straight_through_to_the_input(symmetric):
    layer = applied(plan_of(symmetric)).up
    x = torch.randn(2, 7, 16, requires_grad=True)
    layer.input_quant(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * layer.input_quant(x.detach()))


@BOTH
def test_what_is_cut_off_gets_no_gradient(symmetric):
    layer = applied(plan_of(symmetric, 4, corrected=False)).up
    x = torch.randn(2, 7, 16, requires_grad=True)
    layer.input_quant(x).sum().backward()
    beyond = (x - x.mean(-1, keepdim=True)).abs() > 0.9 * x.abs().amax(-1, keepdim=True)
    assert set(x.grad.unique().tolist()) == {0.0, 1.0}
    assert float(x.grad[beyond].mean()) < 0.2 < 0.8 < float(x.grad[~beyond].mean())


@BOTH
def test_half_precision_agrees_with_the_simulation(symmetric):
    plan = corrected_plan(torchao_models.build().bfloat16())
    for name in ("up", "down"):
        plan.layers[name] = replace(plan.layers[name], activation=DynamicActivationQuant(8, symmetric))
    model = BrevitasAdapter().apply(torchao_models.build().bfloat16(), plan)
    simulated = SimulateAdapter().apply(torchao_models.build().bfloat16(), plan)
    for t in (*torchao_models.TIMESTEPS, [100.0, 900.0]):
        x = torch.randn(2, 4, 8, 8).bfloat16()
        with torch.no_grad():
            expected, found = (each(x, torch.tensor(t)) for each in (simulated, model))
        assert found.dtype == torch.bfloat16
        assert (found - expected).float().norm() < 0.02 * expected.float().norm()


def trained(model: nn.Module, calls) -> nn.Module:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for call in calls:
        optimizer.zero_grad()
        (model(**call) - call["sample"]).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_one_step_of_training_changes_every_weight(calls):
    model = trained(applied(plan_of(bits=4)), calls[:1])
    before = applied(plan_of(bits=4))
    for name, weight in before.named_parameters():
        if name.endswith(".weight"):
            assert not torch.equal(model.get_parameter(name), weight), name


@BOTH
def test_what_was_trained_is_read_back_and_lowers_to_torchao(symmetric, calls):
    pytest.importorskip("torchao")
    from dq_torchao import execution_report

    plan = plan_of(symmetric)
    model = trained(applied(plan), calls)
    read = plan_from_model(model, plan.schedule, base=plan)
    for name, layer in plan.layers.items():
        if layer.kind == "linear":
            assert read.layers[name].activation == DynamicActivationQuant(8, symmetric)
            assert torch.equal(read.layers[name].balance, layer.balance), name
    plain = float_model(model)
    assert weights_hash(plain) == read.model_hash != plan.model_hash
    assert_same(SimulateAdapter().apply(float_model(model), read), model, calls, 1e-4)
    integer = dq.apply(plain, read, backend="torchao")
    assert execution_report(integer)["up"].width == "W8A8 dynamic"
    for call in calls:
        expected, found = model(**call), integer(**call)
        assert (found - expected).norm() < 0.01 * expected.norm()


def test_a_plan_without_any_group_of_its_own_is_read_back():
    model = nn.Sequential(qnn.QuantLinear(8, 8, bias=True, input_quant=Int8DynamicAsymmetricActPerTokenFloat))
    read = plan_from_model(model, handmade_plan(TinyDenoiser()).schedule, timestep="timestep")
    assert read.layers["0"].activation == DynamicActivationQuant(8, symmetric=False)
    assert not read.groups


def test_calibration_and_disabled_quantizers_leave_full_precision(calls):
    model = applied(plan_of(bits=3))
    expected = [model(**call) for call in calls]
    x, seen = torch.randn(2, 5, 16), []
    with torch.no_grad(), calibration_mode(model):
        seen.append(model.up.input_quant(x))
        for call in calls:
            model(**call)
    assert torch.equal(seen[0], x)
    assert all(torch.equal(e, model.eval()(**call)) for e, call in zip(expected, calls, strict=True))
    model.up.input_quant.disable_quant = True
    assert torch.equal(model.up.input_quant(x), x)
    assert model.up.input_quant.bit_width() is None


def test_stock_bias_correction_and_gptq_run(calls):
    plan = plan_of(corrected=False)
    for name, layer in plan.layers.items():
        layer.weight = WeightQuant(3, TinyDenoiser().get_submodule(name).weight.detach().abs().flatten(1).amax(1) / 3)
    model, full = applied(plan), [TinyDenoiser()(**call) for call in calls]

    def error() -> float:
        with torch.no_grad():
            return sum(float((model(**call) - f).square().sum()) for call, f in zip(calls, full, strict=True))

    before = error()
    run_gptq(model, calls)
    rounded = error()
    assert rounded < 0.9 * before
    bias = model.up.bias.clone()
    with torch.no_grad(), bias_correction_mode(model):
        for call in calls:
            model(**call)
    assert not torch.equal(model.up.bias, bias)
    assert error() < before


@BOTH
def test_what_was_trained_is_saved_and_loaded_bit_for_bit(symmetric, calls, tmp_path):
    plan = plan_of(symmetric, 5)
    model = trained(applied(plan), calls[:1])
    save(model, tmp_path)
    assert_same(load(applied(plan), tmp_path), model, calls)
    copied = applied(plan)
    copied.load_state_dict(model.state_dict())
    assert_same(copied, model, calls)


def test_other_ranges_than_were_saved_are_refused_by_layer(tmp_path):
    save(applied(plan_of(symmetric=False)), tmp_path)
    with pytest.raises(DQError, match="'condition' was saved with asymmetric dynamic ranges; .* symmetric dynamic"):
        load(applied(plan_of(symmetric=True)), tmp_path)
    with pytest.raises(DQError, match="'condition' was saved with asymmetric .* ranges that are calibrated"):
        load(applied(all_corrected(handmade_plan(TinyDenoiser()), TinyDenoiser())), tmp_path)
    with pytest.raises(DQError, match="'condition' was saved with 8 bits; this model has 4"):
        load(applied(plan_of(symmetric=False, bits=4)), tmp_path)


def test_the_map_alone_is_enough(calls):
    plan = plan_of()
    mapped = layerwise_quantize(TinyDenoiser(), compute_layer_map=layer_map(plan)).eval()
    assert_same(attach_timesteps(mapped, plan.groups), applied(plan), calls)


# weights of balanced channels are one rounding off in inference mode, so that single inputs land on the next code
@pytest.mark.parametrize(("symmetric", "corrected", "tolerance"), [(False, False, 1e-6), (True, True, 0.01)])
def test_inference_mode_and_torch_export_compute_the_same(symmetric, corrected, tolerance, calls):
    model = applied(plan_of(symmetric, corrected=corrected))
    expected = [model(**call) for call in calls]
    program = export_torch(model, kwargs=calls[0]).module()
    with torch.no_grad(), inference_mode(model):
        model(**calls[0])
        for call, e in zip(calls, expected, strict=True):
            for found in (model(**call), program(**call)):
                assert (found - e).norm() <= tolerance * e.norm()


def test_what_needs_a_constant_scale_says_so(calls):
    model = applied(plan_of(corrected=False))
    with pytest.raises(DQError, match="has dynamic ranges, and QuantizeLinear"):
        export_onnx_qcdq(model, kwargs=calls[0])
    with pytest.raises(DQError, match="has dynamic ranges"):
        freeze_timestep_group(model, 0)
    with pytest.raises(DQError, match="a dynamic quantizer already follows the timestep"):
        convert_to_timestep(model, GROUPS)
    biased = qnn.QuantLinear(4, 4, bias=True, input_quant=Int8DynamicActPerTokenFloat, bias_quant=Int32Bias)
    with pytest.raises(RuntimeError, match="Input scale required"):
        biased(torch.randn(2, 4))


def test_inputs_by_group_stay_so_beside_inputs_by_token():
    plan = plan_of()
    plan.layers["first"].activation = (
        all_corrected(handmade_plan(TinyDenoiser()), TinyDenoiser()).layers["first"].activation
    )
    read = plan_from_model(applied(plan), plan.schedule, base=plan)
    assert isinstance(read.layers["first"].activation, ActivationQuant)
    assert torch.equal(read.layers["first"].activation.scale, plan.layers["first"].activation.scale)
