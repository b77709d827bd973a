from __future__ import annotations

import json

import pytest
from dq_diffusers.building import build_from_config, find_config
from tiny_configs import config_of

from dq_plugins.errors import DQError


def write(folder, config) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_model_is_built_on_the_meta_device(tmp_path):
    write(tmp_path, config_of("dit"))
    model = build_from_config(tmp_path / "config.json")
    assert type(model).__name__ == "DiTTransformer2DModel"
    assert all(p.is_meta for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("folder", ["", "unet", "transformer"])
def test_a_file_a_model_or_a_pipeline_names_the_same_config(tmp_path, folder):
    write(tmp_path / folder, config_of("unet"))
    (tmp_path / "model_index.json").write_text("{}")
    expected = tmp_path / folder / "config.json"
    assert find_config(expected) == expected
    assert find_config(tmp_path) == expected
    assert find_config(tmp_path / "model_index.json") == expected


def test_a_missing_config_says_what_is_expected(tmp_path):
    with pytest.raises(
        DQError, match=r"no config\.json in .*, nor in a folder transformer, unet.* inside it\. Expected"
    ):
        build_from_config(tmp_path)
    with pytest.raises(DQError, match=r"nowhere does not exist\. Expected"):
        build_from_config(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list"),
        ('{"hidden": 3}', "_class_name is None"),
        ('{"_class_name": "DDIMScheduler"}', "'DDIMScheduler', which is not a model of diffusers"),
        ('{"_class_name": "NoSuchModel"}', "partition"),
        ('{"_class_name": "UNet2DModel", "down_block_types": ["Nonsense"]}', "UNet2DModel cannot be built.*Nonsense"),
    ],
)
def test_a_config_that_describes_no_denoiser_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DQError, match=message):
        build_from_config(tmp_path)
