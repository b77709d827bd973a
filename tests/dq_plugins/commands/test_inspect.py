from __future__ import annotations

import json

import pytest
from tiny_configs import config_of

from dq_plugins.cli import main
from dq_plugins.commands.inspect import human


@pytest.fixture
def pipeline(tmp_path):
    folder = tmp_path / "pipeline" / "unet"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of("unet-text")))
    return str(folder.parent)


def test_json_says_everything(pipeline, capsys):
    assert main(["inspect", pipeline, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["denoiser"] == "UNet2DConditionModel"
    assert found["timestep"] == "timestep"
    assert found["signatures"]["temporal"]["layers"] == 10
    assert found["signatures"]["condition"]["layers"] == len(found["roles"]["cross_attention_key"]) * 2 == 8
    assert found["layers"]["conv_in"]["roles"] == ["first"]
    assert found["macs"]["total"] == found["macs"]["layers"] + found["macs"]["attention"]


def test_text_shows_the_same_numbers(pipeline, capsys):
    assert main(["inspect", pipeline, "--batch", "2", "--layers"]) == 0
    text = capsys.readouterr().out
    assert "sample [2, 4, 8, 8]" in text
    assert next(line for line in text.splitlines() if line.startswith("timestep alone")).split()[2] == "10"
    assert "conv_shortcut" in text
    assert "8 tensors of" in text


def test_errors_reach_the_user_as_one_paragraph(pipeline, capsys):
    assert main(["inspect", pipeline, "--timestep", "clock"]) == 2
    assert "no argument 'clock'" in capsys.readouterr().err
    assert main(["inspect", pipeline + "/nowhere"]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1234, "1.23 k"), (27_875_520, "27.9 M"), (999_999, "1.00 M")]
)
def test_counts_have_three_digits(count, text):
    assert human(count) == text
