"""The comparison with other projects: its figures, what goes between processes, and every project's description."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.derived import derive
from benchmarks.peers import NAMES, linear_and_conv, simulated_bytes
from benchmarks.peers.__main__ import arguments, side_by_side
from benchmarks.peers.comparison import feature_distance, paired_interval, psnr
from benchmarks.peers.environment import interpreter
from benchmarks.peers.standing_in import standing_in
from benchmarks.peers.worker import Job


def test_psnr_is_of_every_image() -> None:
    reference = np.zeros((2, 4, 4, 1))
    images = reference + np.array([0.1, 0.01]).reshape(2, 1, 1, 1)
    assert psnr(images, reference) == pytest.approx([20, 40])


def test_features_are_as_far_apart_as_images_are_different() -> None:
    rng = np.random.default_rng(0)
    reference = rng.random((1, 16, 16, 3))
    noise = rng.standard_normal(reference.shape)
    near, far = (feature_distance(reference + size * noise, reference)[0] for size in (0.01, 0.1))
    assert feature_distance(reference, reference) == [0.0]
    assert 0 < near < far


def test_error_power_is_the_mean_over_all_images_of_what_ran() -> None:
    runs = {"ours, 0": {"psnr": [10.0, 20.0]}, "ours, 1": {"psnr": [20.0, 20.0]}, "other, 0": {"failed": "why"}}
    found = derive("peers-digits-W4A4", {"table": [["ours"]], "settings": {}, **runs})
    assert found == {"table": [["ours"]], "power": {"ours": pytest.approx((0.1 + 3 * 0.01) / 4)}}


def test_the_interval_is_of_differences_and_holds_their_mean() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(30, 10, 200)  # images differ far more than methods do
    better = hard + 1 + rng.normal(0, 0.1, 200)
    mean, low, high = paired_interval(better, hard)
    assert low < mean < high
    assert (mean, high - low) == (pytest.approx(1, abs=0.05), pytest.approx(4 * 0.1 / 200**0.5, rel=0.2))


def test_a_picture_has_a_row_for_each_method_whose_images_are_there(tmp_path: Path) -> None:
    images = np.linspace(0, 1, 2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    save_file({"images": torch.from_numpy(1 - images)}, tmp_path / "images.safetensors")
    figure = side_by_side(images, {"ours": tmp_path / "images.safetensors", "lost": tmp_path / "none.safetensors"})
    labels = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]
    assert labels == ["full precision", "ours"]
    shown = [np.asarray(axis.get_images()[0].get_array()) for axis in figure.axes]
    np.testing.assert_allclose(shown, [*images, *(1 - images)])


def test_bytes_of_simulated_weights() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Conv2d(2, 2, 1, bias=False), nn.LayerNorm(4))
    assert linear_and_conv(model) == ["0", "1"]
    assert simulated_bytes(model, {"0": 4, "1": 8}) == 32 // 2 + 4 * 4 + 4 + 8 * 4


def test_what_stands_in_is_called_by_name_and_leaves_the_original_alone() -> None:
    class Denoiser(nn.Module):
        def forward(self, sample: torch.Tensor, timestep: int, return_dict: bool = True) -> torch.Tensor:
            return sample

    denoiser, seen = Denoiser(), []
    other = standing_in(denoiser, lambda **call: seen.append(list(call)))
    other(torch.zeros(1), timestep=3, return_dict=False)
    assert seen == [["sample", "timestep", "return_dict"]]
    assert isinstance(other, Denoiser)
    assert torch.equal(denoiser(torch.ones(1), 3), torch.ones(1))


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    job = Job("sdnq", "SDNQ, dynamic", "digits", 20, (4, None), 1, "calls/1", "calls/2", 10_000, 16)
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job


def test_nothing_is_installed_for_what_is_here() -> None:
    assert interpreter("ours", ()) == Path(sys.executable)


@pytest.mark.parametrize("name", NAMES)
def test_projects_are_described_without_their_packages(name: str) -> None:
    module = importlib.import_module(f"benchmarks.peers.{name}")
    assert all("==" in requirement for requirement in module.REQUIREMENTS)
    assert all(method.widths and method.runs for method in module.METHODS.values())


def test_a_method_that_no_asked_width_has_is_refused_with_those_that_there_are(capsys: pytest.CaptureFixture) -> None:
    assert arguments(["--widths", "W4A4", "W4", "--only", "ours, fast"]).only == ["ours, fast"]
    for wrong in ("ours, mixdq", "our, fast"):  # of other widths, misspelt
        with pytest.raises(SystemExit):
            arguments(["--widths", "W4A4", "W4", "--peers", "ours", "--only", "ours, fast", wrong])
        message = capsys.readouterr().err
        assert f"no method {wrong!r} has widths W4A4, W4" in message
        assert "ours, default" in message
        assert message.count("ours, fast") == 1
