"""The gate as continuous integration calls it, on a pixel pipeline with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_pipelines import class_pipeline

from dq_plugins.cli import main
from dq_plugins.errors import DQError
from dq_plugins.gate import Limit, as_images, judge
from dq_plugins.metrics.lpips import lpips

SHORT = ["--recipe", "fast", "--steps", "3", "--images", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gate")
    class_pipeline().save_pretrained(folder / "pipe")
    assert main(["quantize", str(folder / "pipe"), "--out", str(folder / "run"), *SHORT]) == 0
    return folder


def gate(folder: Path, *more: str) -> int:
    return main(["gate", str(folder / "run"), "--images", "3", *more])


def test_the_exit_status_is_the_verdict(folder, capsys):
    assert gate(folder, "--min-psnr", "5", "--max", "mse=1") == 0
    assert "passed" in capsys.readouterr().out
    assert gate(folder, "--min-psnr", "5", "--min", "psnr=200") == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "min 200" in out


def test_the_verdict_as_data_is_of_the_worst_image(folder, capsys):
    capsys.readouterr()
    assert gate(folder, "--min", "psnr=5", "--json") == 0
    found = json.loads(capsys.readouterr().out)["psnr"]
    assert (found["limit"], found["side"], found["passed"]) == (5, "min", True)
    reference = torch.rand(2, 3, 8, 8)
    output = reference + torch.tensor([0.01, 0.1])[:, None, None, None]
    assert judge(Limit("psnr", "min", 30), reference, output).value == pytest.approx(20)


def test_a_run_of_a_backend_that_wrote_no_pipeline_is_judged_by_its_plan(folder, tmp_path, capsys):
    command = ["quantize", str(folder / "pipe"), "--out", str(tmp_path / "run"), "--backend", "simulate", *SHORT]
    assert main(command) == 0
    assert not (tmp_path / "run" / "pipeline").exists()
    assert gate(tmp_path, "--min-psnr", "5") == 0


def test_what_cannot_be_judged_is_an_error_and_no_verdict(folder, tmp_path, capsys):
    assert gate(folder) == 2
    assert "needs a limit" in capsys.readouterr().err
    assert gate(folder, "--max", "psnr=5") == 2
    assert "higher is better for 'psnr': give its limit with --min" in capsys.readouterr().err
    assert gate(folder, "--min", "psnr") == 2
    (tmp_path / "run").mkdir()
    assert gate(tmp_path, "--min-psnr", "5") == 2
    assert "run.json is missing" in capsys.readouterr().err


def test_lpips_says_what_it_lacks(monkeypatch):
    image = torch.rand(1, 3, 32, 32)
    with pytest.raises(DQError, match="32 pixels"):
        lpips(image[..., :8], image[..., :8])

    def missing(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchmetrics.functional.image.learned_perceptual_image_patch_similarity", missing)
    with pytest.raises(DQError, match=r"weights of torchvision's AlexNet.*no network"):
        lpips(image, image)


def test_lpips_hands_over_images_of_three_channels_between_minus_one_and_one(monkeypatch):
    seen = []

    def distance(x, y, net_type):
        seen.append((x, y, net_type))
        return torch.tensor(0.25)

    monkeypatch.setattr("torchmetrics.functional.image.learned_perceptual_image_patch_similarity", distance)
    image = torch.linspace(0, 1, 32 * 32).reshape(1, 1, 32, 32)
    assert lpips(image, image, value_range=1.0) == 0.25
    x, y, name = seen[0]
    assert (x.shape, x.dtype, name) == ((1, 3, 32, 32), torch.float32, "alex")
    assert (float(x.min()), float(y.max())) == (-1, 1)


def test_images_frames_and_sounds_are_compared():
    shapes = {(2, 8, 8, 3): (2, 3, 8, 8), (2, 4, 8, 8, 3): (8, 3, 8, 8), (2, 1, 16): (2, 1, 1, 16)}
    for shape, expected in shapes.items():
        assert as_images([{"x": torch.zeros(shape).numpy()}]).shape == expected
