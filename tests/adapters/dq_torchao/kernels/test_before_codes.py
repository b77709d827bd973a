from __future__ import annotations

import pytest
import torch
from dq_torchao.kernels import before_codes, merging, native
from merged_graphs import OURS, in_loops, layer, merged, multiply, targets
from torch import Tensor, fx
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason="no kernels of ours here")


def codes_of(x: Tensor, factor: Tensor | None = None, bits: int = 8, symmetric: bool = False, spatial: int = 0):
    return OURS.dynamic_codes(x, factor, bits, symmetric, 1.0 if bits == 8 else 0.6, spatial, ())


def separate(monkeypatch, function, *arguments) -> fx.GraphModule:
    """Merged, but for what lies before codes."""
    with monkeypatch.context() as patch:
        patch.setattr(merging, "on_the_way", lambda graph, node: None)
        return merged(function, *arguments)


def assert_same(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def assert_near(found, expected) -> None:
    """The same but for rounding: a code apart here and there."""
    values = [(codes.double() - zero) * scale for codes, scale, zero in (found, expected)]
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=0)
    assert (values[0] - values[1]).abs().max() <= 1.01 * expected[1].max()
    assert (found[0] != expected[0]).double().mean() < 0.01


@pytest.fixture
def feed() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.randint(0, 256, (3, 40, 24), dtype=torch.uint8), *layer(68, 24)


@pytest.mark.parametrize("form", ["tanh", "none"])
@pytest.mark.parametrize(
    ("outputs", "rows", "balanced", "bits", "symmetric"),
    [(68, 40, False, 8, False), (200, 1, True, 5, False), (1600, 40, False, 8, True), (20, 97, True, 8, True)],
)
def test_a_product_writes_codes_by_ranges_of_their_own(outputs, rows, balanced, bits, symmetric, form):
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (3, rows, 24), dtype=torch.uint8)
    arguments = (torch.rand(outputs) + 0.5, codes, *layer(outputs, 24))

    def run(factor, codes, *parameters):
        return codes_of(OURS.gelu(multiply(codes, parameters), form), factor if balanced else None, bits, symmetric)

    graph = merged(run, *arguments)
    assert targets(graph)[0] is OURS.product_dynamic_codes.default
    assert OURS.dynamic_codes.default not in targets(graph)
    assert_same(graph(*arguments), run(*arguments))


@pytest.mark.parametrize("after_product", [False, True])
def test_a_width_that_the_timestep_selects_comes_along(feed, after_product: bool):
    def run(form, codes, *parameters):
        y = multiply(codes, parameters)
        y = OURS.gelu(y, "tanh") if after_product else F.layer_norm(y.clone(), (68,))
        return OURS.dynamic_codes(y, None, 8, True, 1.0, 0, (), form=form)

    graphs = [merged(run, torch.tensor(form), *feed) for form in ([127.0, 1.0], [7.0, 0.7])]
    for graph, form in zip(graphs, ([7.0, 0.7], [127.0, 1.0]), strict=True):  # that of the other trace
        target = OURS.product_dynamic_codes.default if after_product else OURS.dynamic_codes.default
        (made,) = (node for node in graph.graph.nodes if node.target is target)
        assert made.kwargs["form"] is not None
        found, expected = (f(torch.tensor(form), *feed) for f in (graph, run))
        assert_same(found, expected) if after_product else assert_near(found, expected)
        assert int(found[0].max()) - 128 == form[0]


def test_of_a_gate_as_well(feed):
    arguments = (feed[0], *layer(256, 24))

    def run(codes, *parameters):
        hidden, gate = multiply(codes, parameters).chunk(2, -1)
        return codes_of(hidden * OURS.gelu(gate, "none"))

    graph = merged(run, *arguments)
    assert OURS.product_dynamic_codes.default in targets(graph)
    assert OURS.gelu.default not in targets(graph)
    assert_same(graph(*arguments), run(*arguments))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_the_rows(threads):
    arguments = (torch.randint(0, 256, (700, 64), dtype=torch.uint8), *layer(132, 64))

    def run(codes, *parameters):
        return codes_of(OURS.gelu(multiply(codes, parameters), "tanh"))

    graph, before = merged(run, *arguments), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = graph(*arguments)
    finally:
        torch.set_num_threads(before)
    assert_same(found, run(*arguments))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("modulated", [(68,), (3, 1, 68), None])
@pytest.mark.parametrize("balanced", [False, True])
def test_layer_normalisation_and_modulation(feed, affine, modulated, balanced, monkeypatch):
    def run(weight, bias, factor, scale, shift, codes, *parameters):
        own = (weight, bias) if affine else (None, None)
        x = F.layer_norm(multiply(codes, parameters), (68,), *own, 1e-5)
        return codes_of(x * (1 + scale) + shift if modulated else x, factor if balanced else None)

    arguments = (*torch.randn(2, 68), torch.rand(68) + 0.5, *torch.randn(2, *(modulated or (1,))), *feed)
    graph, apart = merged(run, *arguments), separate(monkeypatch, run, *arguments)
    kinds = set(targets(graph))
    assert OURS.row_statistics.default not in kinds
    assert torch.ops.aten.sub.Tensor not in kinds
    assert OURS.row_statistics.default in targets(apart)
    assert_same(graph(*arguments), apart(*arguments))
    assert_near(graph(*arguments), run(*arguments))


def test_parts_of_a_larger_tensor(feed, monkeypatch):
    """As AdaLN makes them: factors and addends that lie apart."""

    def run(modulation, codes, *parameters):
        shift, scale = modulation.unsqueeze(1).chunk(2, -1)
        return codes_of(F.layer_norm(multiply(codes, parameters), (68,)) * scale + shift)

    arguments = (torch.randn(3, 136), *feed)
    graph = merged(run, *arguments)
    assert torch.ops.aten.mul.Tensor not in targets(graph)
    assert_same(graph(*arguments), separate(monkeypatch, run, *arguments)(*arguments))


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(2, 24, 5, 6), (1, 130, 3, 3), (3, 64, 40, 41)])
def test_group_normalisation(feed, shape, silu, monkeypatch):
    x = torch.randn(shape) * torch.logspace(-2, 2, shape[0]).reshape(-1, 1, 1, 1)

    def run(x, weight, bias, codes, *parameters):
        y = F.group_norm(x * 2.0, 2, weight, bias, 1e-5)
        return *codes_of(F.silu(y) if silu else y, spatial=2), multiply(codes, parameters)

    arguments = (x.to(memory_format=torch.channels_last), *torch.randn(2, shape[1]), *feed)
    graph, apart = merged(run, *arguments), separate(monkeypatch, run, *arguments)
    if silu:
        assert torch.ops.aten.exp.default not in targets(graph)
    (codes,) = (node for node in graph.graph.nodes if node.target is OURS.dynamic_codes.default)
    assert len(codes.args[6]) == 2
    assert codes.args[7:] == (1e-5, silu, 2)
    assert OURS.group_statistics.default not in targets(graph)
    found, expected = graph(*arguments)[:3], apart(*arguments)[:3]
    (assert_near if silu else assert_same)(found, expected)
    assert_near(found, run(*arguments)[:3])


def test_values_that_something_else_needs_stay(feed):
    """Nothing is computed twice."""

    def twice(codes, *parameters):
        x = F.layer_norm(multiply(codes, parameters), (68,)) * parameters[3]
        return *codes_of(x), x

    def half_way(codes, *parameters):
        x = F.layer_norm(multiply(codes, parameters), (68,))
        return *codes_of(x * parameters[3]), x

    def residual(codes, *parameters):
        y = multiply(codes, parameters)
        return codes_of(y + y.flip(0))

    def per_position(codes, *parameters):
        return codes_of(multiply(codes, parameters) * parameters[3][:40, None])

    for run, taken in ((twice, []), (half_way, 2), (residual, []), (per_position, [])):
        graph = merged(run, *feed)
        (codes,) = (node for node in graph.graph.nodes if node.target is OURS.dynamic_codes.default)
        assert codes.args[6] == [] if taken == [] else len(codes.args[6]) == taken, run
        assert len(codes.args) == 7 or codes.args[7] is None
        assert_near(graph(*feed)[:3], run(*feed)[:3])


def test_images_whose_channels_lie_apart_stay(feed):
    def run(x, codes, *parameters):
        return *codes_of(F.silu(x * 2.0), spatial=2), multiply(codes, parameters)

    x = torch.randn(2, 8, 5, 5)
    graph = merged(run, x, *feed)
    assert torch.ops.aten.exp.default in targets(graph)
    assert_near(graph(x, *feed)[:3], run(x, *feed)[:3])


def test_not_a_number_is_found_on_the_way(feed):
    def run(scale, codes, *parameters):
        return codes_of(F.layer_norm(multiply(codes, parameters), (68,)) * scale)

    scale = torch.ones(3, 1, 68)
    scale[1, 0, 5] = torch.nan
    graph = merged(run, scale, *feed)
    _, scales, zeros = graph(scale, *feed)
    assert scales[1].eq(1.0).all()
    assert zeros[1].eq(128).all()
    assert scales[0].ne(1.0).all()


@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_given_ranges_after_layer_normalisation(feed, affine, balanced, bits, monkeypatch):
    monkeypatch.setattr(before_codes, "FEWEST", 0)

    def run(modulation, factor, codes, *parameters):
        shift, scale = modulation.unsqueeze(1).chunk(2, -1)
        x = F.layer_norm(multiply(codes, parameters), (68,), *parameters[3:] if affine else ())
        x = x * (1 + scale) + shift
        return in_loops(x, (1 / factor, parameters[1]) if balanced else (parameters[0] * 10, parameters[1]), bits)

    arguments = (torch.randn(3, 136), torch.rand(68) + 0.5, *feed)
    graph, apart = merged(run, *arguments), separate(monkeypatch, run, *arguments)
    assert OURS.activation_codes_after.default in targets(graph)
    assert not {torch.ops.aten.round.default, OURS.row_statistics.default} & set(targets(graph))
    assert torch.ops.aten.round.default in targets(apart)
    assert torch.equal(graph(*arguments), apart(*arguments))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(2, 24, 5, 6), (1, 130, 3, 3), (3, 64, 40, 41)])
def test_given_ranges_after_group_normalisation(feed, shape, silu, threads, monkeypatch):
    monkeypatch.setattr(before_codes, "FEWEST", 0)

    def run(x, weight, bias, codes, *parameters):
        y = F.group_norm(x * 2.0, 2, weight, bias, 1e-5)
        return in_loops(F.silu(y) if silu else y, (parameters[0] * 10, parameters[1])), multiply(codes, parameters)

    x = torch.randn(shape).to(memory_format=torch.channels_last)
    arguments = (x, *torch.randn(2, shape[1]), *feed)
    graph, apart, before = merged(run, *arguments), separate(monkeypatch, run, *arguments), torch.get_num_threads()
    assert not {torch.ops.aten.round.default, OURS.group_statistics.default} & set(targets(graph))
    try:
        torch.set_num_threads(threads)
        found, expected = graph(*arguments)[0], apart(*arguments)[0]
    finally:
        torch.set_num_threads(before)
    assert found.stride() == expected.stride()
    apart_by = (found.int() - expected.int()).abs()
    assert apart_by.max() <= silu
    assert apart_by.double().mean() < 0.01


def test_given_ranges_of_small_inputs_stay_in_loops(feed):
    def run(codes, *parameters):
        return in_loops(F.layer_norm(multiply(codes, parameters), (68,)), parameters)

    graph = merged(run, *feed)
    assert torch.ops.aten.round.default in targets(graph)
    assert OURS.activation_codes_after.default not in targets(graph)
