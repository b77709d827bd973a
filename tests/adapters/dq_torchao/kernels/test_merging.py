from __future__ import annotations

import pytest
import torch
from dq_torchao.kernels import activation_codes, merging, native
from dq_torchao.kernels.norm import group_statistics, row_statistics
from merged_graphs import OURS, in_loops, layer, merged, multiply, targets
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason="no kernels of ours here")


@pytest.fixture
def feed() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.randint(0, 256, (2, 30, 24), dtype=torch.uint8), *layer(68, 24), *layer(20, 68)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("form", ["tanh", "none"])
def test_a_product_and_what_follows_become_one(feed, form, bits):
    def run(codes, *parameters):
        hidden = OURS.gelu(multiply(codes, parameters[:5]), form)
        return multiply(in_loops(F.dropout(hidden, 0.1, False), parameters[5:], bits), parameters[5:])

    graph = merged(run, *feed)
    assert targets(graph).count(OURS.product.default) == 2
    assert torch.ops.aten.round.default not in targets(graph)
    assert OURS.gelu.default not in targets(graph)
    assert torch.equal(graph(*feed), run(*feed))


@pytest.mark.parametrize("outputs", [128, 96])
@pytest.mark.parametrize("coded", [True, False])
def test_a_gate_becomes_part_of_the_product(feed, outputs, coded):
    first, second = layer(outputs, 24), layer(20, outputs // 2)

    def run(codes, *parameters):
        hidden, gate = multiply(codes, parameters[:5]).chunk(2, -1)
        hidden = hidden * OURS.gelu(gate, "none")
        return in_loops(hidden, parameters[5:]) if coded else hidden

    arguments = (feed[0], *first, *second)
    graph = merged(run, *arguments)
    assert (OURS.gelu.default in targets(graph)) == (outputs % 128 != 0)
    assert torch.equal(graph(*arguments), run(*arguments))


def test_halves_that_are_used_otherwise_stay(feed):
    parameters = layer(128, 24)

    def halves_the_other_way(codes, *parameters):
        gate, hidden = multiply(codes, parameters).chunk(2, -1)
        return hidden * OURS.gelu(gate, "tanh")

    def gate_twice(codes, *parameters):
        hidden, gate = multiply(codes, parameters).chunk(2, -1)
        return hidden * OURS.gelu(gate, "tanh") + gate

    for run in (halves_the_other_way, gate_twice):
        graph = merged(run, feed[0], *parameters)
        assert OURS.gelu.default in targets(graph)
        assert torch.equal(graph(feed[0], *parameters), run(feed[0], *parameters))


def test_a_factor_for_each_channel(feed):
    balance = torch.rand(68) + 0.5

    def run(codes, balance, *parameters):
        hidden = OURS.gelu(multiply(codes, parameters[:5]), "tanh")
        scaled = hidden * (parameters[5].reciprocal() * balance)
        return multiply((scaled.round() + parameters[6]).clamp(0, 255).to(torch.uint8), parameters[5:])

    arguments = (feed[0], balance, *feed[1:])
    graph = merged(run, *arguments)
    assert torch.ops.aten.round.default not in targets(graph)
    assert torch.equal(graph(*arguments), run(*arguments))


def test_values_that_are_used_twice_stay(feed):
    def activation_twice(codes, *parameters):
        hidden = OURS.gelu(multiply(codes, parameters[:5]), "tanh")
        return multiply(in_loops(hidden, parameters[5:]), parameters[5:]), hidden

    def product_twice(codes, *parameters):
        y = multiply(codes, parameters[:5])
        return OURS.gelu(y, "tanh"), y

    def changed_between(codes, *parameters):
        y = multiply(codes, parameters[:5])
        y += 1
        return OURS.gelu(y, "tanh")

    for run, gelu in ((activation_twice, 0), (product_twice, 1), (changed_between, 1)):
        graph = merged(run, *feed)
        assert targets(graph).count(OURS.gelu.default) == gelu
        for found, expected in zip(graph(*feed), run(*feed), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("affine", [False, True])
def test_layer_normalisation(feed, affine):
    def run(codes, *parameters):
        weight, bias = (parameters[3], parameters[4]) if affine else (None, None)  # any tensors
        return F.layer_norm(multiply(codes, parameters[:5]) / 1.0, (68,), weight, bias, 1e-5)

    graph = merged(run, *feed)
    assert OURS.row_statistics.default in targets(graph)
    assert not {torch.ops.aten.var_mean.correction, torch.ops.aten.div.Tensor} & set(targets(graph))
    torch.testing.assert_close(graph(*feed), run(*feed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_group_normalisation(feed, layout):
    x = torch.randn(2, 24, 5, 6).to(memory_format=layout)

    def run(x, codes, *parameters):
        y = multiply(codes, parameters[:5])
        return F.group_norm(x * 2.0, 6, parameters[3][:24], parameters[4][:24], 1e-5), y

    graph = merged(run, x, *feed)
    assert OURS.group_statistics.default in targets(graph)
    assert torch.ops.aten.var_mean.correction not in targets(graph)
    torch.testing.assert_close(graph(x, *feed)[0], run(x, *feed)[0], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 1, 1, 1), 1), ((2, 12, 3, 5), 3), ((3, 200, 9, 8), 20), ((2, 128, 20, 20), 32)]
)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_group_statistics_are_those_of_float64(shape, groups, layout, threads):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 30).to(memory_format=layout)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        mean, inverse = group_statistics(x, groups, 1e-5)
    finally:
        torch.set_num_threads(before)
    exact, middle = torch.var_mean(x.double().reshape(len(x), groups, -1), -1, correction=0)
    torch.testing.assert_close(mean.double(), middle.reshape(mean.shape), rtol=1e-6, atol=0)
    torch.testing.assert_close(inverse.double(), (exact + 1e-5).rsqrt().reshape(mean.shape), rtol=2e-5, atol=0)


def test_the_statistics_of_other_dimensions_stay(feed):
    def run(codes, *parameters):
        y = multiply(codes, parameters[:5])
        variance, mean = torch.var_mean(y, [1], correction=0, keepdim=True)
        return (y - mean) * (variance + 1e-5).rsqrt() + y.var(-1, keepdim=True)

    graph = merged(run, *feed)
    assert OURS.row_statistics.default not in targets(graph)
    assert torch.equal(graph(*feed), run(*feed))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (4, 5, 67), (300, 130)])
def test_row_statistics_are_those_of_float64(shape, threads):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 30
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        mean, inverse = row_statistics(x, 1e-5)
    finally:
        torch.set_num_threads(before)
    exact, middle = torch.var_mean(x.double(), -1, correction=0, keepdim=True)
    torch.testing.assert_close(mean.double(), middle, rtol=1e-6, atol=0)
    torch.testing.assert_close(inverse.double(), (exact + 1e-5).rsqrt(), rtol=2e-5, atol=0)


def test_other_graphs_stay_and_another_pass_comes_first():
    seen = []

    class Other(merging.CustomGraphPass):
        def __call__(self, graph):
            seen.append(len(graph.nodes))

        def uuid(self):
            return "other"

    with inductor_config.patch(post_grad_custom_post_pass=Other()):
        merging.install()
        merging.install()
        graph = make_fx(lambda x: x / 1.0, tracing_mode="fake")(torch.ones(3))
        inductor_config.post_grad_custom_post_pass(graph.graph)
        assert len(seen) == 1
        assert torch.ops.aten.div.Tensor in targets(graph)
        assert inductor_config.post_grad_custom_post_pass.uuid()[1] == "other"
    with inductor_config.patch(post_grad_custom_post_pass=print):  # a pass that has no name: left as it is
        merging.install()
        assert inductor_config.post_grad_custom_post_pass is print


def test_codes_as_a_compiler_sees_them_are_those_of_the_kernel(feed):
    x = torch.randn(40, 68)
    assert torch.equal(in_loops(x, feed[6:], 5), activation_codes(x, feed[6].reciprocal(), feed[7], 5))


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of two heads to codes, ``[2, L, H D]``."""
    one, zero = torch.tensor([0.02]), torch.tensor([120], dtype=torch.int32)
    heads = (x.reshape(2, -1, 2, 8).transpose(1, 2) for x in (queries, keys, values))
    y = OURS.int8_attention(*heads, None, False, 0.3, *[one, zero] * 3, 8, torch.float32)
    return y.transpose(1, 2).reshape(2, -1, 16)


@pytest.mark.parametrize("each", [False, True], ids=["one factor", "a factor for each channel"])
def test_codes_go_into_attention_and_out_of_it(feed, each):
    layers = [layer(16, 24) for _ in range(3)] + [layer(20, 16)]
    balance = torch.rand(16) + 0.5

    def run(codes, balance, *parameters):
        q, k, v, out = (parameters[5 * i : 5 * i + 5] for i in range(4))
        y = attend(*(in_loops(multiply(codes, one), one) for one in (q, k, v)))
        factor = (out[0].reciprocal() * balance) if each else out[0].reciprocal()
        codes = ((y * factor).round() + out[1]).clamp(0, 255).to(torch.uint8)
        return multiply(codes, out)

    arguments = (feed[0], balance, *(tensor for each in layers for tensor in each))
    graph = merged(run, *arguments)
    assert targets(graph).count(OURS.product.default) == 4
    assert torch.ops.aten.round.default not in targets(graph)
    assert torch.equal(graph(*arguments), run(*arguments))


def test_results_that_are_used_otherwise_stay_values(feed):
    layers = [layer(16, 24) for _ in range(3)]

    def query_twice(codes, *parameters):
        q, k, v = (multiply(codes, parameters[5 * i : 5 * i + 5]) for i in range(3))
        return attend(*(in_loops(x, parameters) for x in (q, k, v))) + q

    arguments = (feed[0], *(tensor for each in layers for tensor in each))
    graph = merged(query_twice, *arguments)
    assert targets(graph).count(torch.ops.aten.round.default) == 1
    assert torch.equal(graph(*arguments), query_twice(*arguments))
