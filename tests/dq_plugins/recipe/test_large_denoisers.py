"""Beside a large denoiser, the codes of weights lie in files until the plan is dropped; everything else is the same."""

import copy
import pickle
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from denoisers import recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.passes.rounding.gptq import GPTQ
from dq_plugins.recipe import Recipe, Step

RECIPE = Recipe("r", "", (Step("weight-ranges"), Step("gptq", {"memory_mb": 16}), Step("bias-correction")))
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    calibration = recorded(denoiser, tmp_path_factory.mktemp("calib"))
    small = dq.make_plan(denoiser, calibration, RECIPE, act_bits=None, progress=False)
    return denoiser, calibration, small


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr("dq_plugins.quantized.memory.LARGE", 1)


def in_file(tensor: torch.Tensor) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(each, 16) for each in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return ".safetensors" in line
    return False


def codes(plan):
    return [layer.weight.codes for layer in plan.layers.values() if layer.weight and layer.weight.codes is not None]


@linux
@pytest.mark.parametrize("where", ["workdir", "out", "nowhere"])
def test_codes_lie_in_files_and_the_plan_is_the_same(case, large, where, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    denoiser, calibration, small = case
    folders = {} if where == "nowhere" else {where: tmp_path / "run"}
    plan = dq.make_plan(denoiser, calibration, RECIPE, act_bits=None, progress=False, **folders)
    assert codes(plan)
    assert all(in_file(each) for each in codes(plan))
    assert not any(in_file(layer.weight.scale) for layer in plan.layers.values() if layer.weight)
    assert not [path for path in tmp_path.rglob("*.tmp") if path.name.startswith("dq-plan")]  # the plan outlives them
    assert plan == small == copy.deepcopy(plan) == pickle.loads(pickle.dumps(plan))
    names = [file.name for file in sorted(small.save(tmp_path / "small").iterdir())]
    plan.save(tmp_path / "large")
    for name in names:
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "large" / name).read_bytes()
    x = next(calibration.calls())
    one, two = (dq.apply(copy.deepcopy(denoiser), each, backend="torchao") for each in (plan, small))
    assert torch.equal(x.run(one), x.run(two))


@linux
def test_a_run_that_goes_on_reads_codes_from_its_files(case, large, tmp_path, monkeypatch):
    denoiser, calibration, small = case
    given = {"act_bits": None, "progress": False, "workdir": tmp_path}
    sweep, sweeps = GPTQ._sweep, []

    def interrupted(self, *args):
        sweeps.append(args[0])
        if len(sweeps) == 2:
            raise KeyboardInterrupt
        return sweep(self, *args)

    monkeypatch.setattr(GPTQ, "_chunks", lambda self, layers, context: iter([layers[:2], layers[2:]]))
    monkeypatch.setattr(GPTQ, "_sweep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dq.make_plan(denoiser, calibration, RECIPE, **given)
    plan = dq.make_plan(denoiser, calibration, RECIPE, **given)
    assert [chunk == sweeps[0] for chunk in sweeps] == [True, False, False]  # the first one was not made again
    again = dq.make_plan(denoiser, calibration, RECIPE, **given)
    assert len(sweeps) == 3
    assert all(in_file(each) for each in (*codes(plan), *codes(again)))
    assert plan == again
    assert plan.layers.keys() == small.layers.keys()


def test_a_tensor_in_two_places_is_written_twice(tmp_path):
    from dq_plugins.artifact import Format, StoredTensor

    both = Format("both", 1, dict[str, StoredTensor])
    codes = torch.zeros(1 << 16, dtype=torch.int8)
    found = both.read(both.write(tmp_path / "x.safetensors", {"a": codes, "b": codes, "c": codes[: 1 << 10]}))
    assert [len(found[name]) for name in "abc"] == [1 << 16, 1 << 16, 1 << 10]
