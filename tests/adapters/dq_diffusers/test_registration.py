"""Our method stands in diffusers' tables beside the others, and a process without us is told what to import."""

from __future__ import annotations

import subprocess
import sys

import pytest
from diffusers import PipelineQuantizationConfig, TorchAoConfig, UNet2DModel
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.torchao import TorchAoHfQuantizer
from dq_diffusers import DQConfig
from dq_diffusers.registration import register
from dq_torchao import PlanConfig

from dq_plugins.errors import DQError

LOAD = """
import sys
from diffusers import UNet2DModel
try:
    UNet2DModel.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "got dq (import dq_diffusers) - supported types are" in str(error), error
    assert "dq" not in str(error).partition("supported types")[2]
else:
    raise AssertionError("it was loaded")
import dq_diffusers
UNet2DModel.from_pretrained(sys.argv[1])
"""
TORCHAO_ALONE = """
import sys, dq_torchao
assert not any(name.partition(".")[0] in ("diffusers", "dq_diffusers") for name in sys.modules)
finders = [type(finder).__module__.partition(".")[0] for finder in sys.meta_path]
assert "dq_torchao" not in finders
"""
SAVE_WITHOUT_NAMING_US = """
import sys, torch
from diffusers import UNet2DModel
from torchao.quantization import quantize_
from dq_torchao import TimestepInt8Config, linear_and_conv2d
model = UNet2DModel.from_pretrained(sys.argv[1])
quantize_(model, TimestepInt8Config(groups=2), linear_and_conv2d)
for t in (100, 500):
    model(torch.randn(1, 3, 8, 8), torch.tensor(t))
quantize_(model, TimestepInt8Config(step="convert"), linear_and_conv2d)
model.save_pretrained(sys.argv[2])
again = UNet2DModel.from_pretrained(sys.argv[2])
x = torch.randn(1, 3, 8, 8)
assert torch.equal(model(x, torch.tensor(100)).sample, again(x, torch.tensor(100)).sample)
"""


def run(code: str, *arguments: object) -> None:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_process_without_us_is_told_what_to_import(saved_unet):
    run(LOAD, saved_unet.folder / "quantized")


def test_dq_torchao_knows_nothing_of_diffusers():
    run(TORCHAO_ALONE)


def test_who_only_knows_torchao_can_save_and_load(saved_unet, tmp_path):
    run(SAVE_WITHOUT_NAMING_US, saved_unet.folder / "float", tmp_path)


def test_the_entries_of_other_methods_are_theirs():
    before = dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    register()
    assert before == (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING)
    assert AUTO_QUANTIZER_MAPPING["torchao"] is TorchAoHfQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["torchao"] is TorchAoConfig


def test_configs_of_ours_in_torchaos_method_are_told_what_to_do(saved_unet):
    with pytest.raises(DQError, match="a library that loads models has a config of its own for plans"):
        UNet2DModel.from_pretrained(
            saved_unet.folder / "float", quantization_config=TorchAoConfig(PlanConfig(saved_unet.plan))
        )


def test_a_pipeline_config_takes_ours(saved_unet):
    config = DQConfig(saved_unet.plan)
    assert PipelineQuantizationConfig(quant_mapping={"unet": config}).quant_mapping == {"unet": config}
