from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from dq_plugins.layer_kinds import BY_OPERATOR, LAYER_KINDS, exact_kind, kind_name, kind_of, mixed_in

LAYERS = {
    "linear": (nn.Linear(4, 6), (2, 5, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 7)),
    "conv3d": (nn.Conv3d(4, 6, 3), (2, 4, 3, 5, 4)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 9, 7)),
    "conv_transpose3d": (nn.ConvTranspose3d(4, 6, 3), (2, 4, 3, 5, 4)),
}


def test_every_kind_is_known_by_its_name_its_module_and_its_operator():
    assert {*LAYERS, "embedding"} == set(LAYER_KINDS)
    for name, (layer, _) in LAYERS.items():
        assert kind_of(layer) is exact_kind(layer) is BY_OPERATOR[name] is LAYER_KINDS[name]
    assert kind_of(nn.Embedding(3, 4)) is BY_OPERATOR["embedding_bag"] is LAYER_KINDS["embedding"]
    assert BY_OPERATOR["addmm"].name == "linear"
    assert LAYER_KINDS["embedding"].outputs((3, 4)) == 4
    assert kind_of(nn.LayerNorm(4)) is None


def test_a_subclass_is_of_the_kind_but_may_compute_something_else():
    class Initialised(nn.Conv1d):
        def reset_parameters(self):
            nn.init.zeros_(self.weight)

    class Standardised(nn.Conv1d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight - weight.mean(), bias)

    class Scaled(nn.Conv1d):
        def forward(self, input):
            return super().forward(input) * 2

    for layer in (Initialised(4, 6, 3), Standardised(4, 6, 3), Scaled(4, 6, 3)):
        assert kind_of(layer) is LAYER_KINDS["conv1d"]
    assert exact_kind(Initialised(4, 6, 3)) is LAYER_KINDS["conv1d"]
    assert exact_kind(Standardised(4, 6, 3)) is exact_kind(Scaled(4, 6, 3)) is None
    weight_norm = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))
    assert exact_kind(weight_norm) is None


@pytest.mark.parametrize("name", LAYERS)
def test_axes_are_those_that_pytorch_uses(name):
    layer, shape = LAYERS[name]
    kind, x = LAYER_KINDS[name], torch.randn(shape)
    y = layer(x)
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.shape
    transposed = kind.output_axis == 1
    assert kind.outputs(weight, groups) == y.shape[kind.channel_axis] == 6
    assert weight[kind.input_axis] * (1 if transposed else groups) == x.shape[kind.channel_axis] == 4
    assert kind.kernel(weight) == (3,) * kind.spatial
    assert kind.products(weight, groups) == 4 // groups * 3**kind.spatial
    assert kind.positions(y.shape) == y[0].numel() // 6
    unbatched = layer(x[0])
    assert unbatched.shape[kind.channel_axis] == 6


@pytest.mark.parametrize("name", LAYERS)
def test_a_parameter_per_output_broadcasts_over_the_channels(name):
    layer, shape = LAYERS[name]
    kind, bias = LAYER_KINDS[name], torch.randn(6)
    with torch.no_grad():
        layer.bias.zero_()
        bare = layer(torch.ones(shape))
        layer.bias.copy_(bias)
        assert torch.allclose(bare + kind.per_output(bias), layer(torch.ones(shape)), atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_the_weight_belong_to_one_output_exactly_where_the_table_says_so(name):
    """Scaling row 0 scales output 0 and nothing else, or it does not."""
    layer, shape = LAYERS[name]
    kind, x = LAYER_KINDS[name], torch.randn(shape)
    with torch.no_grad():
        layer.bias.zero_()
        before = layer(x).movedim(kind.channel_axis, 0)
        layer.weight[0] *= 2
        after = layer(x).movedim(kind.channel_axis, 0)
        layer.weight[0] /= 2
    belongs = torch.allclose(after[0], 2 * before[0], atol=1e-5) and torch.allclose(after[1:], before[1:], atol=1e-5)
    assert kind.scale_per_row == belongs


def test_products_are_counted_by_hand():
    assert LAYER_KINDS["linear"].macs((2, 7, 5), (3, 5), (2, 7, 3)) == 2 * 7 * 3 * 5
    assert LAYER_KINDS["conv2d"].macs((1, 8, 5, 5), (8, 1, 3, 3), (1, 8, 5, 5)) == 8 * 25 * 9
    assert LAYER_KINDS["conv_transpose1d"].macs((1, 4, 3), (4, 5, 2), (1, 5, 6)) == 4 * 3 * 5 * 2
    assert LAYER_KINDS["embedding"].macs((10, 4), (3,), (3, 4)) == 0


class Doubled(nn.Module):
    """A layer that gives its output twice over."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


DOUBLED = mixed_in(Doubled, "Doubled", [LAYER_KINDS["linear"], LAYER_KINDS["conv1d"]])


def test_a_class_for_every_kind_from_what_they_share():
    assert {plain.__name__: made.__name__ for plain, made in DOUBLED.items()} == {
        "Linear": "DoubledLinear",
        "Conv1d": "DoubledConv1d",
    }
    layer = nn.Conv1d(4, 6, 3)
    x = torch.randn(2, 4, 9)
    expected = 2 * layer(x)
    layer.__class__ = DOUBLED[nn.Conv1d]
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)


def test_plans_call_a_layer_by_its_kind_and_what_has_none_by_its_class():
    assert kind_name(nn.ConvTranspose2d(4, 6, 3)) == "conv_transpose2d"
    assert kind_name(nn.MultiheadAttention(4, 2).out_proj) == "linear"
    assert kind_name(nn.MultiheadAttention(4, 2)) == "MultiheadAttention"
