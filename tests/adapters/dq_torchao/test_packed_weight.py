from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import dq_torchao
import pytest
import torch
from dq_torchao.lowering import lower_layer
from dq_torchao.packed_weight import PackedWeight
from safetensors import safe_open
from torch import nn
from torchao_models import GROUPS, Denoiser, denoiser_plan, layer_plan, sqnr

import dq_plugins as dq
from dq_plugins.plan import LayerPlan, QuantPlan, Reason, WeightQuant
from dq_plugins.quantized.layer import simulate_layer
from dq_plugins.timesteps import TimestepContext

SCALAR, PER_SAMPLE = torch.tensor(500.0), torch.tensor([100.0, 800.0])
LAYERS = {
    "linear": (lambda: nn.Linear(37, 11), (2, 5, 37)),
    "conv2d": (lambda: nn.Conv2d(6, 10, 3, padding=1), (2, 6, 5, 7)),
    "grouped": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=(1, 2), groups=2, bias=False), (2, 6, 5, 7)),
}
FLOAT_LAYERS = LAYERS | {
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, padding=1), (2, 6, 9)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 3, padding=1), (2, 3, 4, 5, 6)),
}
SYMMETRIC = [*((bits, "affine", False) for bits in (8, 4, 3, 2, 1)), (1, "binary", False)]
ASYMMETRIC = [(bits, "affine", True) for bits in (8, 7, 4, 3, 2, 1)]


def weight_quant(layer: nn.Module, bits: int, scheme: str = "affine", asymmetric: bool = False) -> WeightQuant:
    rows = layer.weight.detach().flatten(1)
    scale = rows.abs().mean(1) if scheme == "binary" else rows.abs().amax(1) / 2 ** max(bits - 1, 0)
    zero_point = -(torch.arange(len(scale), dtype=torch.int32) % 2) if asymmetric else None
    return WeightQuant(bits, scale, zero_point, scheme=scheme)


def pair(layer: nn.Module, plan: LayerPlan) -> tuple[nn.Module, nn.Module, TimestepContext]:
    """The layer lowered, the layer simulated, and what both are routed by."""
    context = TimestepContext({"all": GROUPS})
    lowered, simulated = copy.deepcopy(layer), simulate_layer(copy.deepcopy(layer), plan, context)
    lower_layer(lowered, plan, context)
    return lowered, simulated, context


def output_step(layer: nn.Module, plan: LayerPlan) -> torch.Tensor:
    """Smallest step of the layer's integer result, ``s s_w``, at the finest group."""
    return plan.activation.scale.min() * plan.weight.scale.min()


@pytest.mark.parametrize("timestep", [SCALAR, PER_SAMPLE], ids=["batch", "per-sample"])
@pytest.mark.parametrize("act_bits", [8, 6, 4])
@pytest.mark.parametrize(("bits", "scheme", "asymmetric"), [*SYMMETRIC, *ASYMMETRIC[1:]])
@pytest.mark.parametrize("kind", LAYERS)
def test_integer_layers_of_any_width_equal_simulation(kind, bits, scheme, asymmetric, act_bits, timestep):
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    layer = build()
    plan = layer_plan(layer, act_bits=act_bits)
    plan.weight = weight_quant(layer, bits, scheme, asymmetric)
    integer, simulated, context = pair(layer, plan)
    assert integer.execution.state == "integer"
    with context.select(timestep):
        x = torch.randn(shape) * 4
        y, reference = integer(x), simulated(x)
        assert (y - reference).abs().max() < 0.5 * output_step(layer, plan)
        torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("bits", "scheme", "asymmetric"), [*SYMMETRIC, *ASYMMETRIC])
@pytest.mark.parametrize("kind", FLOAT_LAYERS)
def test_weight_only_layers_equal_simulation_bit_for_bit(kind, bits, scheme, asymmetric):
    torch.manual_seed(0)
    build, shape = FLOAT_LAYERS[kind]
    layer = build()
    plan = LayerPlan(
        kind, weight=weight_quant(layer, bits, scheme, asymmetric), unquantized_reason=Reason("inputs stay as they are")
    )
    packed, simulated, _ = pair(layer, plan)
    assert packed.execution.state == "weight-only"
    assert isinstance(packed, PackedWeight)
    x = torch.randn(shape)
    assert torch.equal(packed(x), simulated(x))


def test_layers_that_cannot_run_in_integers_are_packed_all_the_same():
    torch.manual_seed(0)
    layer = nn.Linear(12, 9)
    plan = layer_plan(layer)
    plan.weight = weight_quant(layer, 8, asymmetric=True)
    packed, simulated, context = pair(layer, plan)
    assert (packed.execution.state, isinstance(packed, PackedWeight)) == ("simulated", True)
    assert packed.execution.reason == "8-bit weight codes less the zero points of the plan do not fit int8"
    with context.select(SCALAR):
        x = torch.randn(4, 12) * 3
        assert torch.equal(packed(x), simulated(x))


@pytest.mark.parametrize("act_bits", [8, None])
@pytest.mark.parametrize("bits", [8, 4, 3, 1])
def test_memory_and_state_dict_hold_bits(bits, act_bits):
    layer = nn.Conv2d(16, 24, 3)
    plan = layer_plan(layer)
    plan.weight = weight_quant(layer, bits)
    if act_bits is None:
        plan.activation, plan.unquantized_reason = None, Reason("inputs stay as they are")
    packed, _, _ = pair(layer, plan)
    assert not any(p.dim() > 1 for p in packed.parameters())
    state = packed.state_dict()
    assert state["weight_packed"].nbytes == 16 * 24 * 9 * bits // 8
    floats = sum(t.nbytes for name, t in state.items() if name not in ("weight_packed", "code_widths"))
    assert state["code_widths"].nbytes <= 5
    assert floats <= 4 * (24 + 24) + 8 * 3  # weight scale, bias, and the table of three groups


def test_state_dict_carries_the_weight_to_another_layer():
    torch.manual_seed(0)
    one, other = nn.Linear(30, 20), nn.Linear(30, 20)
    layers = []
    for layer in (one, other):
        plan = layer_plan(layer)
        plan.weight = weight_quant(layer, 3)
        lowered, _, context = pair(layer, plan)
        with context.select(PER_SAMPLE):
            lowered(torch.randn(2, 30))  # the kernels have laid out the old weight by now
        layers.append(lowered)
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 30)
    with layers[0].context.select(PER_SAMPLE), layers[1].context.select(PER_SAMPLE):
        assert torch.equal(layers[0](x), layers[1](x))


@pytest.mark.parametrize("act_bits", [8, None])
def test_copies_and_pickles_compute_the_same(act_bits):
    torch.manual_seed(0)
    layer = nn.Linear(30, 20)
    plan = layer_plan(layer)
    plan.weight = weight_quant(layer, 3)
    if act_bits is None:
        plan.activation, plan.unquantized_reason = None, Reason("inputs stay as they are")
    packed, _, context = pair(layer, plan)
    with context.select(SCALAR):
        x = torch.randn(2, 30)
        y = packed(x)
        for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            with copied.context.select(SCALAR) if act_bits is not None else nullcontext():
                assert torch.equal(copied(x), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_follows_casts_and_its_scale_does_not(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(30, 20)
    plan = LayerPlan("linear", weight=weight_quant(layer, 4), unquantized_reason=Reason("inputs stay as they are"))
    packed, simulated, _ = pair(layer, plan)
    scale = packed.weight_scale.clone()
    packed.to(dtype)
    assert (packed.weight.dtype, packed.weight_scale.dtype) == (dtype, torch.float32)
    assert torch.equal(packed.weight_scale, scale)
    x = torch.randn(2, 30, dtype=dtype)
    assert torch.equal(packed(x), simulated.to(dtype)(x))


def test_weight_only_layers_compile_to_one_graph():
    torch.manual_seed(0)
    layer = nn.Linear(30, 20)
    plan = LayerPlan("linear", weight=weight_quant(layer, 4), unquantized_reason=Reason("inputs stay as they are"))
    packed, simulated, _ = pair(layer, plan)
    torch.compiler.reset()
    x = torch.randn(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(packed, fullgraph=True)(x), simulated(x))


def test_embeddings_are_packed_unless_they_change_their_own_weight():
    torch.manual_seed(0)
    for max_norm, packs in ((None, True), (1.0, False)):
        layer = nn.Embedding(11, 16, max_norm=max_norm).requires_grad_(False)
        plan = LayerPlan("embedding", weight=weight_quant(layer, 4), unquantized_reason=Reason("its input is an index"))
        packed, simulated, _ = pair(layer, plan)
        assert isinstance(packed, PackedWeight) == packs
        index = torch.tensor([[3, 0], [10, 3]])
        assert torch.equal(packed(index), simulated(index))


def test_meta_layers_are_packed_without_values():
    layer = nn.Conv2d(6, 10, 3, device="meta")
    plan = LayerPlan(
        "conv2d", weight=WeightQuant(3, torch.ones(10)), unquantized_reason=Reason("inputs stay as they are")
    )
    packed, _, _ = pair(layer, plan)
    assert (packed.weight_packed.is_meta, packed.weight_packed.numel()) == (True, -(-6 * 10 * 9 * 3 // 8))


def test_wider_weights_stay_in_floating_point():
    layer = nn.Linear(12, 9)
    packed, simulated, _ = pair(
        layer, LayerPlan("linear", weight=WeightQuant(12, torch.full((9,), 1e-3)), unquantized_reason=Reason("wide"))
    )
    assert type(packed) is nn.Linear
    assert torch.equal(packed.weight, simulated.weight)


def mixed_plan(model: nn.Module) -> QuantPlan:
    """Every layer at a width of its own, one with floating activations, as an exact bit allocation writes."""
    plan = denoiser_plan(model)
    widths = {"conv_in": (8, "affine", 8), "up": (3, "affine", 6), "down": (1, "binary", 8)}
    widths |= {"conv_out": (4, "affine", None)}
    for name, (bits, scheme, act_bits) in widths.items():
        layer = plan.layers[name]
        layer.weight = weight_quant(model.get_submodule(name), bits, scheme)
        if act_bits is None:
            layer.activation, layer.unquantized_reason = None, Reason("inputs stay as they are")
        else:
            layer.activation = layer_plan(model.get_submodule(name), act_bits=act_bits).activation
    return plan


def test_mixed_widths_in_one_denoiser_equal_simulation():
    torch.manual_seed(0)
    model = Denoiser().eval().requires_grad_(False)
    plan = mixed_plan(model)
    simulated = dq.apply(model, plan, backend="simulate")
    quantized = dq.apply(model, plan, backend="torchao")
    report = dq_torchao.execution_report(quantized)
    assert [(e.width, e.state, e.bits) for n, e in report.items() if n != "time"] == [
        ("W8A8", "integer", 8),
        ("W3A6", "integer", 3),
        ("W1A8", "integer", 1),
        ("W4A32", "weight-only", 4),
    ]
    for timestep in (100.0, 500.0, [100.0, 900.0]):
        inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(timestep)}
        assert sqnr(simulated(**inputs), quantized(**inputs)) > 45


def test_file_of_a_denoiser_is_the_sum_of_its_bits_and_scales(tmp_path):
    torch.manual_seed(0)
    model = Denoiser(width=48).eval().requires_grad_(False)
    plan = mixed_plan(model)
    bits = sum(model.get_submodule(n).weight.numel() * p.weight.bits / 8 for n, p in plan.layers.items() if p.weight)
    quantized = dq.apply(model, plan, backend="torchao")
    quantized(sample=torch.randn(2, 4, 8, 8), timestep=torch.tensor(100.0))  # what kernels hold is not part of it
    dq_torchao.save(quantized, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    codes = sum(size for name, size in sizes.items() if name.endswith("weight_packed"))
    assert bits <= codes <= 1.02 * bits
    outputs = 48 + 4 * 48 + 48 + 4
    kept = 4 * (48 + 48) + 4 * outputs  # the temporal layer in floating point, and biases
    scales = 4 * outputs + 3 * (4 + 4) * 3  # of weights, and three tables of three groups
    timesteps = 8 * (2 + 2)
    widths = sum(size for name, size in sizes.items() if name.endswith("code_widths"))
    assert widths <= 5 * len(plan.layers)
    assert sum(sizes.values()) == codes + kept + scales + timesteps + widths
