import copy

import pytest
import torch
from denoisers import recorded, tiny_denoiser

import dq_plugins as dq


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser, folder = tiny_denoiser(), tmp_path_factory.mktemp("calib")
    return denoiser, recorded(denoiser, folder / "calls", batch=8), recorded(denoiser, folder / "others", seed=1)


@torch.no_grad()
def error(case, recipe: str, **widths) -> float:
    """Squared error of outputs on calls that nothing was calibrated on."""
    denoiser, calibration, others = case
    plan = dq.make_plan(denoiser, calibration, recipe, progress=False, **widths)
    model = dq.apply(copy.deepcopy(denoiser), plan, backend="simulate")
    return sum(float((call.run(model) - call.output).square().sum()) for call in others.calls())


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4), (4, None)])
def test_best_has_no_larger_error_than_default(case, bits) -> None:
    widths = {"weight_bits": bits[0], "act_bits": bits[1], "edge_bits": 4}
    assert error(case, "best", **widths) <= error(case, "default", **widths)
