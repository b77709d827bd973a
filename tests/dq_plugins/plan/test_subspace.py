import pytest
import torch

from dq_plugins.errors import PlanError
from dq_plugins.plan import LayerPlan, Subspace
from dq_plugins.plan.fitting import misfit


def basis(rank: int, channels: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(channels, rank)).Q.T.contiguous().half()


def test_what_it_takes() -> None:
    subspace = Subspace(basis(3, 16))
    assert subspace.rank == 3
    assert subspace.nbytes(torch.zeros(5, 16, 3, 3)) == 2 * (3 * 16 + 5 * 3 * 9)
    assert torch.equal(subspace.truncated(2).basis, subspace.basis[:2])


@pytest.mark.parametrize(
    ("damaged", "text"),
    [
        (torch.eye(4).half(), "fewer directions than channels"),
        (torch.zeros(0, 4).half(), "fewer directions than channels"),
        (torch.ones(4).half(), "directions, channels"),
        (torch.eye(5)[:2], "float16"),
        (torch.full((2, 8), torch.nan).half(), "nan"),
    ],
)
def test_a_damaged_basis_is_refused(damaged: torch.Tensor, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        Subspace(damaged)


def test_it_has_to_fit_its_layer() -> None:
    plan = LayerPlan("conv2d", subspace=Subspace(basis(3, 16)), unquantized_reason=None)
    assert not misfit(plan, torch.nn.Conv2d(16, 8, 3))
    assert "directions of 16 channels in floating point, and 12" in misfit(plan, torch.nn.Conv2d(12, 8, 3))
    assert "2 groups" in misfit(plan, torch.nn.Conv2d(32, 8, 3, groups=2))
    table = LayerPlan("embedding", subspace=Subspace(basis(3, 16)))
    assert "which a embedding layer does not take" in misfit(table, torch.nn.Embedding(9, 16))
