from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from dq_plugins.passes.rotation.branches import low_rank_of, subspace_of
from dq_plugins.passes.rotation.held_out_error import InputRows, held_out_error
from dq_plugins.plan import Subspace, Targets
from dq_plugins.quantized.layer_transform import LayerTransform
from dq_plugins.quantized.split import Split
from dq_plugins.quantized.weight_scale import layer_quantizer

WEIGHT = Targets(3, None)


def planted(rank: int) -> tuple[nn.Linear, torch.Tensor]:
    """A layer whose weight is small and even but for a large part of a few dimensions."""
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 48, bias=False)
    large = torch.randn(48, rank, generator=g) @ torch.randn(rank, 64, generator=g)
    layer.weight = nn.Parameter(20 * large + torch.randn(48, 64, generator=g), requires_grad=False)
    return layer, torch.randn(500, 64, generator=g)


def left(layer: nn.Module, method: str, x: torch.Tensor, rank: int) -> float:
    """Error of the output with the weight alone quantized."""
    transform = LayerTransform(low_rank=low_rank_of(method, layer, x, rank, WEIGHT))
    rest = transform.of_weight(layer, layer.weight)
    fake = layer_quantizer(layer, 3, WEIGHT, transform=transform).fake_quantize(rest)
    return float((x @ (fake - rest).T).square().mean())


@pytest.mark.parametrize("method", ["weight", "error", "weighted-error"])
def test_a_planted_part_is_taken(method):
    layer, x = planted(3)
    plain = layer_quantizer(layer, 3, WEIGHT).fake_quantize(layer.weight)
    without = float((x @ (plain - layer.weight).T).square().mean())
    assert left(layer, method, x, 3) < (0.02 if method == "weight" else 0.9) * without


def test_whitening_serves_the_inputs_that_there_are():
    layer, x = planted(0)
    x = x * torch.logspace(-1, 1, 64)
    assert left(layer, "weighted-error", x, 8) < 0.7 * left(layer, "error", x, 8)


def test_the_balance_counts_and_is_undone():
    layer, x = planted(3)
    balance = torch.logspace(-1, 1, 64)
    branch = low_rank_of("weight", layer, x, 64 - 16, WEIGHT, balance)
    values = torch.linalg.svd((layer.weight * balance).double()).S
    rest = LayerTransform(balance, None, branch).of_weight(layer, layer.weight)
    assert float(rest.norm()) < 0.01 * float(values.square().sum().sqrt())  # its rank is that of the weight


@pytest.mark.parametrize("act_bits", [3, None])
def test_a_planted_subspace_is_found_and_all_of_its_error_goes(act_bits):
    g = torch.Generator().manual_seed(0)
    layer, targets = nn.Linear(64, 48, bias=False).requires_grad_(False), Targets(3, act_bits)
    loud = torch.linalg.qr(torch.randn(64, 5, generator=g)).Q.T  # [5, C]
    x = torch.randn(800, 64, generator=g) + 30 * torch.randn(800, 5, generator=g) @ loud
    subspace = subspace_of(x, 5)
    assert torch.linalg.svdvals(subspace.basis.float() @ loud.T).min() > 0.999
    seen, held_out = (InputRows(part, torch.zeros(400, dtype=torch.int64)) for part in (x[:400], x[400:]))
    transform = LayerTransform(split=Split(subspace))
    errors = [held_out_error([layer], seen, held_out, each, targets) for each in (None, transform)]
    assert errors[1] < 0.02 * errors[0]
    random = LayerTransform(split=Split(Subspace(torch.linalg.qr(torch.randn(64, 5, generator=g)).Q.T.half())))
    assert held_out_error([layer], seen, held_out, random, targets) > 0.5 * errors[0]


def test_the_subspace_leaves_the_least_energy() -> None:
    x = torch.randn(300, 12, 3, 3) * torch.logspace(-1, 1, 12)[:, None, None]
    energy = float(Split(subspace_of(x, 4)).outside(x, 1).square().sum())
    for channels in itertools.combinations(range(12), 4):
        others = [c for c in range(12) if c not in channels]
        assert energy <= float(x[:, others].square().sum()) * 1.001
    assert subspace_of(x, 12) is None


@pytest.mark.parametrize(("outputs", "products"), [(12, 40), (40, 12)])
def test_no_other_branch_of_that_rank_errs_less(outputs: int, products: int) -> None:
    """Against the singular vectors of what is left, whitened by the second moments."""
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(products, outputs, bias=False)
    layer.weight = nn.Parameter(torch.randn(outputs, products, generator=g), requires_grad=False)
    x = torch.randn(300, products, generator=g) * torch.logspace(-1, 1, products)
    rest = layer.weight - layer_quantizer(layer, 3, WEIGHT, method="coarse").fake_quantize(layer.weight)
    moments = (x.T @ x / len(x)).double()
    root = torch.linalg.cholesky(moments + 0.01 * moments.diagonal().mean() * torch.eye(products))
    for method, metric in (("error", torch.eye(products).double()), ("weighted-error", root)):
        branch = low_rank_of(method, layer, x, 4, WEIGHT)
        left = float(((rest.double() - (branch.up.double() @ branch.down.double())) @ metric).square().sum())
        least = float(torch.linalg.svdvals(rest.double() @ metric)[4:].square().sum())
        assert left == pytest.approx(least, rel=1e-3)  # its numbers are float16
