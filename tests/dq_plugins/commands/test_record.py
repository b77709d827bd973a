from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from dq_diffusers.pipelines import PixelClassConditionalPipeline

from dq_plugins.calibration import CalibrationSet
from dq_plugins.cli import main
from dq_plugins.commands.record import read_call, read_prompts
from dq_plugins.errors import DQError


@pytest.fixture
def pipeline(tmp_path):
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=1, out_channels=1, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=3, norm_num_groups=1,
    )  # fmt: skip
    PixelClassConditionalPipeline(transformer, DDIMScheduler()).save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_records_a_saved_pipeline(pipeline, tmp_path, capsys):
    out = tmp_path / "calib"
    assert main(["record", str(pipeline), "--out", str(out), "--steps", "3", "--images", "2", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    calib = CalibrationSet.open(out)
    assert summary["calls"] == len(calib) == 3
    assert summary["hash"] == calib.hash
    assert main(["record", str(pipeline), "--out", str(out), "--steps", "3", "--images", "2"]) == 0
    assert "3 calls of DiTTransformer2DModel at 3 timesteps" in capsys.readouterr().out


def test_errors_are_one_line_and_status_2(pipeline, tmp_path, capsys):
    assert main(["record", str(tmp_path / "nowhere"), "--out", str(tmp_path / "calib")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_what_cannot_be_resumed_can_be_overwritten(pipeline, tmp_path, capsys):
    command = ["record", str(pipeline), "--out", str(tmp_path / "calib"), "--steps", "3", "--images", "2"]
    assert main(command) == 0
    assert main([*command, "--seed", "1"]) == 2
    assert "(--overwrite on the command line)" in capsys.readouterr().err
    assert main([*command, "--seed", "1", "--overwrite"]) == 0


def test_prompts_come_from_the_command_line_or_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red fox\n\n  a cat \n")
    assert read_prompts([str(file)]) == ["a red fox", "a cat"]
    assert read_prompts(["a dog", "a cow"]) == ["a dog", "a cow"]
    file.write_text("\n")
    with pytest.raises(DQError, match="holds no prompts"):
        read_prompts([str(file)])


def test_arguments_of_the_pipelines_call_are_json_images_or_text(tmp_path):
    from PIL import Image

    Image.new("RGB", (2, 3)).save(tmp_path / "start.png")
    read = read_call(["strength=0.6", "sizes=[1, 2]", f"image={tmp_path / 'start.png'}", "style=a=b"])
    assert read.pop("image").size == (2, 3)
    assert read == {"strength": 0.6, "sizes": [1, 2], "style": "a=b"}
    (tmp_path / "notes").write_text("no image")
    for wrong, message in (("strength", "NAME=VALUE"), (f"image={tmp_path / 'notes'}", "not an image")):
        with pytest.raises(DQError, match=message):
            read_call([wrong])
