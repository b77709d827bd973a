from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from denoisers import recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.comfy import write_comfy
from dq_plugins.errors import PlanError
from dq_plugins.plan import BiasCorrection
from dq_plugins.recipe import Recipe, Step

ROUNDED = Recipe("rounded", "", (Step("weight-ranges"), Step("gptq")))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    return denoiser, recorded(denoiser, tmp_path_factory.mktemp("calib"))


def written(case, tmp_path, change=lambda plan: None, **options):
    denoiser, calibration = case
    given = {"weight_bits": 6, "act_bits": None, "edge_bits": 6, "progress": False, **options}
    plan = dq.make_plan(denoiser, calibration, ROUNDED, **given)
    change(plan)
    left = write_comfy(denoiser, plan, tmp_path / "x.safetensors", prefix="p.")
    return plan, left, safetensors.torch.load_file(tmp_path / "x.safetensors")


def test_linear_layers_are_int8_with_the_rounding_of_the_plan_and_others_hold_its_values(case, tmp_path):
    denoiser, (plan, left, state) = case[0], written(case, tmp_path)
    kinds = {name: layer.kind for name, layer in plan.layers.items() if layer.weight is not None}
    assert {name for name, kind in kinds.items() if kind != "linear"} == left.keys()
    assert len(kinds) > len(left) > 0
    for name, kind in kinds.items():
        fake = plan.layers[name].weight.fake_quantize(denoiser.get_submodule(name).weight)
        found = state[f"p.{name}.weight"]
        if kind == "linear":
            scale = state[f"p.{name}.weight_scale"]
            assert found.dtype == torch.int8
            assert scale.shape == (len(found), 1)
            assert json.loads(bytes(state[f"p.{name}.comfy_quant"].tolist())) == {"format": "int8_tensorwise"}
            found = found * scale
        assert torch.equal(found, fake), name
    rest = denoiser.state_dict().keys() - {f"{name}.weight" for name in kinds}
    assert all(torch.equal(state[f"p.{name}"], denoiser.state_dict()[name]) for name in rest)


def test_what_the_layout_cannot_say_is_written_in_floating_point_with_the_reason(case, tmp_path):
    def change(plan):
        name = next(name for name, layer in plan.layers.items() if layer.kind == "linear")
        plan.layers[name].balance = torch.linspace(0.5, 2, case[0].get_submodule(name).in_features)

    _, left, _ = written(case, tmp_path, change, symmetric_weights=False)
    assert any("zero points (symmetric_weights=True" in why for why in left.values())
    plan, left, state = written(case, tmp_path, change)
    name = next(name for name, layer in plan.layers.items() if layer.balance is not None)
    layer, weight = plan.layers[name], case[0].get_submodule(name).weight
    assert "transformed" in left[name]
    expected = layer.weight.fake_quantize(weight * layer.balance) / layer.balance
    assert torch.allclose(state[f"p.{name}.weight"], expected)


def test_a_correction_for_all_timesteps_is_in_the_bias(case, tmp_path):
    def change(plan):
        name = next(n for n, each in plan.layers.items() if each.weight is not None and bias_of(n) is not None)
        plan.layers[name].bias_correction = BiasCorrection(torch.ones(1, len(bias_of(name))))

    def bias_of(name):
        return case[0].get_submodule(name).bias

    plan, _, state = written(case, tmp_path, change)
    name = next(name for name, layer in plan.layers.items() if layer.bias_correction is not None)
    assert torch.equal(state[f"p.{name}.bias"], bias_of(name) + 1)


def test_another_denoiser_is_refused(case, tmp_path):
    plan = dq.make_plan(*case, ROUNDED, progress=False)
    with pytest.raises(PlanError):
        write_comfy(tiny_denoiser(1), plan, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_comfy_kitchen_reads_the_same_values(case, tmp_path):
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    layout = kitchen.TensorWiseINT8Layout
    plan, left, state = written(case, tmp_path)
    for name in (name for name, layer in plan.layers.items() if layer.weight is not None and name not in left):
        weight, scale = state[f"p.{name}.weight"], state[f"p.{name}.weight_scale"]
        params = layout.Params(scale=scale, orig_dtype=torch.float32, orig_shape=tuple(weight.shape))
        found = kitchen.QuantizedTensor(weight, "TensorWiseINT8Layout", params)
        fake = plan.layers[name].weight.fake_quantize(case[0].get_submodule(name).weight)
        assert torch.equal(found.dequantize(), fake)
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
        expected = x @ fake.T
        close = 0.05 * float(expected.abs().max())  # its inputs are in 8 bits
        assert torch.allclose(torch.nn.functional.linear(x, found), expected, atol=close)
