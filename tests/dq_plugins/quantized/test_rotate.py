from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dq_plugins.errors import PlanError
from dq_plugins.layer_kinds import kind_of
from dq_plugins.plan import Rotation
from dq_plugins.quantized.layer_transform import LayerTransform
from dq_plugins.quantized.rotate import Rotate, hadamard_matrix

LAYERS = {
    "linear": lambda: (nn.Linear(32, 6), (3, 5, 32)),
    "1x1": lambda: (nn.Conv2d(32, 6, 1), (2, 32, 4, 4)),
    "3x3": lambda: (nn.Conv2d(32, 6, 3, padding=1, stride=2), (2, 32, 5, 4)),
    "reflected": lambda: (nn.Conv2d(32, 6, 3, padding=1, padding_mode="reflect"), (2, 32, 5, 4)),
    "grouped": lambda: (nn.Conv1d(32, 6, 3, groups=2), (2, 32, 9)),
    "3d": lambda: (nn.Conv3d(32, 2, 2), (32, 3, 3, 3)),
}


def rotation(kind: str, block: int, blocks: int) -> Rotation:
    if kind != "matrix":
        return Rotation(kind, block)
    g = torch.Generator().manual_seed(0)
    return Rotation("matrix", block, torch.linalg.qr(torch.randn(blocks, block, block, generator=g).double()).Q)


@pytest.mark.parametrize("regular", [False, True])
@pytest.mark.parametrize("order", [4, 16, 64, 256])
def test_hadamard_matrices(order, regular):
    matrix = hadamard_matrix(order, regular=regular)
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix, matrix.T)
    assert (len(matrix.sum(1).unique()) == 1) == regular


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(list(LAYERS)),
    kind=st.sampled_from(["hadamard", "regular-hadamard", "matrix"]),
    power=st.integers(1, 4),
    balanced=st.booleans(),
)
def test_exact_in_full_precision(name, kind, power, balanced):
    torch.manual_seed(power)
    layer, shape = LAYERS[name]()
    layer, x, channels = layer.double(), torch.randn(shape).double(), kind_of(layer)
    block = 4 ** min(power, 2) if kind == "regular-hadamard" else 2**power
    if kind == "matrix" and name == "grouped":
        return  # a group would need matrices of its own
    balance = torch.rand(32) + 0.5 if balanced else None
    transform = LayerTransform(balance, Rotate(rotation(kind, block, 32 // block)))
    other = copy.deepcopy(layer)
    other.weight = nn.Parameter(transform.of_weight(layer, layer.weight.detach()))
    rotated = transform.of_input(channels, x)
    assert rotated.shape == x.shape
    assert float((other(rotated) - layer(x)).abs().max()) < 1e-9
    assert float((transform.input_restored(channels, rotated) - x).abs().max()) < 1e-9
    assert float((transform.weight_restored(layer, other.weight) - layer.weight).abs().max()) < 1e-9
    assert not torch.allclose(other.weight, layer.weight)


def test_a_loud_channel_is_spread_over_its_block():
    x = torch.zeros(1, 64)
    x[0, 3] = 8
    rotated = Rotate(Rotation("hadamard", 16))(x)[0]
    assert torch.equal(rotated[:16].abs(), torch.full((16,), 2.0))
    assert not rotated[16:].any()


def test_what_channels_have_in_common_stays_spread_in_regular_blocks():
    x = torch.ones(1, 16)
    assert Rotate(Rotation("hadamard", 16))(x).abs().max() == 4  # in one channel
    assert torch.equal(Rotate(Rotation("regular-hadamard", 16))(x), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rotated_in_float32(dtype):
    rotate, x = Rotate(Rotation("hadamard", 8)).to(dtype), torch.randn(3, 16)
    assert rotate.matrix.dtype == torch.float32
    assert torch.equal(rotate(x.to(dtype)), rotate(x.to(dtype).float()))
    assert not rotate.state_dict()


def test_the_hash_knows_kind_and_block():
    hashes = {LayerTransform(None, Rotate(r)).hash for r in (Rotation("hadamard", 4), Rotation("hadamard", 16))}
    hashes |= {LayerTransform(None, Rotate(Rotation("regular-hadamard", 4))).hash, LayerTransform(torch.ones(4)).hash}
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rotation("hadamard", 6), "power of 2 channels, got 6"),
        (lambda: Rotation("regular-hadamard", 8), "power of 4 channels, got 8"),
        (lambda: Rotation("matrix", 4), "has a matrix"),
        (lambda: Rotation("hadamard", 4, torch.eye(4)[None].double()), "others have none"),
        (lambda: Rotation("matrix", 4, torch.eye(4).double()), r"\[blocks, 4, 4\]"),
        (lambda: Rotation("matrix", 4, torch.eye(4)[None]), "float64"),
        (lambda: Rotation("other", 4), "'other'"),
    ],
)
def test_impossible_rotations_are_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()


@pytest.mark.parametrize("kind", ["hadamard", "matrix"])
def test_other_channels_than_it_is_for_are_told(kind):
    with pytest.raises(PlanError, match="does not fit the 36 of this layer"):
        Rotate(rotation(kind, 8, 4))(torch.ones(2, 36))
