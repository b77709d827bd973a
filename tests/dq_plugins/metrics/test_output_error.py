"""Error of a denoiser whose error is known: the same in every image, or of mean zero."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import dq_plugins as dq
from dq_plugins.calibration import CalibrationSet
from dq_plugins.metrics.output_error import output_errors, output_sqnr
from dq_plugins.testing.denoiser import TinyDenoiser, example_inputs

OFFSET = torch.tensor([0.5, 0.0, -1.0, 0.25])[None, :, None, None]  # by channel


class Wrong(nn.Module):
    def __init__(self, denoiser: nn.Module, error) -> None:
        super().__init__()
        self.denoiser, self.error = denoiser, error

    def forward(self, sample, timestep, condition):
        output = self.denoiser(sample, timestep, condition)
        return output + self.error(output)


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> CalibrationSet:
    def sample(denoiser: nn.Module) -> None:
        for t in (900.0, 500.0):
            denoiser(**{**example_inputs(4), "timestep": torch.tensor(t)})

    return dq.record(TinyDenoiser(), sample, Path(tmp_path_factory.mktemp("calls")), progress=False)


def checkerboard(output: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(output.shape[-2])[:, None] + torch.arange(output.shape[-1])
    return (1 - 2.0 * (rows % 2)).expand_as(output)


def test_an_error_that_all_images_share_is_drift(calls):
    for error in output_errors(Wrong(TinyDenoiser(), lambda y: OFFSET.expand_as(y)), calls).values():
        assert error.noise == pytest.approx(4 * 64 * float(OFFSET.square().sum()), rel=1e-5)
        assert error.drift == pytest.approx(error.noise, rel=1e-5)


def test_an_error_of_mean_zero_is_none(calls):
    for error in output_errors(Wrong(TinyDenoiser(), checkerboard), calls).values():
        assert error.noise == pytest.approx(4 * 4 * 64, rel=1e-5)
        assert error.drift < 1e-8 * error.noise


def test_sqnr_is_that_of_the_whole_error(calls):
    wrong = Wrong(TinyDenoiser(), lambda y: 0.1 * y)
    assert output_sqnr(wrong, calls) == pytest.approx(dict.fromkeys((500.0, 900.0), 20.0), abs=1e-4)
    assert set(output_sqnr(TinyDenoiser(), calls).values()) == {math.inf}
