from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from artifacts import edit_file, edit_record
from denoisers import sampler as tiny_sampler
from denoisers import tiny_denoiser
from torch import nn

from dq_plugins.calibration import CalibrationSet, record
from dq_plugins.errors import CalibrationError
from dq_plugins.hashing import weights_hash


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def forward(self, x, t, table=None):
        return self.linear(x) + torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1) / 1000


def record_at(tmp_path, timesteps, batch=2):
    """One call for each of ``timesteps``, which may be numbers or tensors of any allowed shape."""

    def sample(denoiser):
        generator = torch.Generator().manual_seed(0)
        for t in timesteps:
            denoiser(torch.randn(batch, 4, generator=generator), t)

    return record(Denoiser(), sample, tmp_path)


@pytest.mark.parametrize(
    "t",
    [7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor([7, 7]), torch.tensor(7.0, dtype=torch.bfloat16)],
)
def test_every_form_of_one_timestep_counts_as_one(tmp_path, t):
    calib = record_at(tmp_path, [t])
    assert calib.timesteps == (7.0,)
    assert calib.schedule.timesteps == (7.0,)
    (call,) = calib.calls(7)
    assert call.kwargs["x"].shape == (2, 4)
    assert torch.equal(call.run(Denoiser()), call.output)


def test_guidance_as_two_calls_and_as_one_batch_visit_the_same_schedule(tmp_path):
    two = record_at(tmp_path / "two", [9, 9, 5, 5, 1, 1])
    one = record_at(tmp_path / "one", [9, 5, 1], batch=4)
    assert two.schedules == one.schedules
    assert [len(list(two.calls(t))) for t in two.timesteps] == [2, 2, 2]


def test_one_schedule_for_every_sampling_run_that_is_alike(tmp_path):
    calib = record_at(tmp_path, [9, 5, 1] * 3 + [9, 1])
    assert [s.timesteps for s in calib.schedules] == [(9.0, 5.0, 1.0), (9.0, 1.0)]


def test_samples_with_their_own_timesteps_are_found_by_timestep(tmp_path):
    calib = record_at(tmp_path, [torch.tensor([9, 5, 9]), torch.tensor([5, 1, 1])], batch=3)
    assert calib.timesteps == (1.0, 5.0, 9.0)
    assert len(calib) == len(list(calib.calls())) == 2
    first, second = calib.calls()
    low, high = calib.calls(5)
    assert torch.equal(low.kwargs["x"], first.kwargs["x"][[1]])
    assert torch.equal(high.output, second.output[[0]])
    (nine,) = calib.calls(9)
    assert nine.timestep.tolist() == [9, 9]
    assert torch.allclose(nine.run(Denoiser()), nine.output)


def test_a_selection_leaves_out_samples_too(tmp_path):
    calib = record_at(tmp_path, [torch.tensor([9, 5, 9]), 5], batch=3)
    part = calib.subset([5])
    assert [call.kwargs["x"].shape[0] for call in part.calls()] == [1, 3]
    assert part.timesteps == (5.0,)


def test_subsets_select_by_timestep_call_and_number(tmp_path):
    calib = record_at(tmp_path, [9, 5, 1] * 3)
    assert len(calib.subset([5, 1])) == 6
    assert [c.index for c in calib.subset(calls=[0, 4]).calls()] == [0, 4]
    assert [c.index for c in calib.subset([9], per_timestep=2).calls()] == [0, 3]
    assert len(calib.subset([5]).subset(calls=[4])) == 1
    assert calib.subset([5, 1]).hash != calib.hash == calib.subset().hash


def test_empty_and_unknown_selections_are_errors(tmp_path):
    calib = record_at(tmp_path, [9, 5])
    with pytest.raises(CalibrationError, match="no calls at timestep 4"):
        calib.subset([4])
    with pytest.raises(CalibrationError, match="leaves none of the 2 calls"):
        calib.subset(calls=[17])
    with pytest.raises(CalibrationError, match="no calls at timestep 6; the nearest of its 2 timesteps is 5"):
        list(calib.calls(6))


@pytest.mark.parametrize(
    ("timesteps", "expected"), [([7], (7, 7)), ([9, 5, 3], (-1, 13)), ([0.5, 0.25], (0.0, 1 - 0.25))]
)
def test_the_valid_range_reaches_one_gap_beyond(tmp_path, timesteps, expected):
    assert record_at(tmp_path, timesteps).timestep_range == expected


def test_hash_sees_the_data_and_not_the_folder(tmp_path):
    a, b = record_at(tmp_path / "a", [9, 5]), record_at(tmp_path / "b", [9, 5])
    assert a.hash == b.hash == CalibrationSet.open(tmp_path / "a").hash
    assert a.hash != record_at(tmp_path / "c", [9, 5], batch=3).hash
    assert a.hash != record_at(tmp_path / "d", [9, 5.5]).hash


def test_check_model_refuses_other_weights(tmp_path):
    calib = record_at(tmp_path, [9])
    calib.check_model(weights_hash(Denoiser()))
    with pytest.raises(CalibrationError, match="recorded from other weights of Denoiser"):
        calib.check_model(weights_hash(nn.Linear(1, 1)))


def test_example_inputs_are_the_first_calls_arguments(tmp_path):
    example = record_at(tmp_path, [9, 5]).example_inputs()
    assert set(example) == {"x", "t"}
    assert float(example["t"]) == 9
    assert torch.equal(example["x"], torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))


def test_pickle_keeps_it_readable(tmp_path):
    calib = record_at(tmp_path, [9])
    list(calib.calls())
    assert len(list(pickle.loads(pickle.dumps(calib)).calls())) == 1


def test_reading_needs_no_class_of_the_model(tmp_path):
    module = tmp_path / "model_code.py"
    module.write_text(
        "import torch\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Out:\n    sample: torch.Tensor\n"
        "class Model(torch.nn.Module):\n    def forward(self, x, t):\n        return Out(x * t)\n"
    )
    run = "from model_code import Model; import torch, dq_plugins.calibration as c;"
    run += "c.record(Model(), lambda m: m(torch.ones(2), 3), 'calib', progress=False)"
    subprocess.run([sys.executable, "-c", run], cwd=tmp_path, check=True)
    (call,) = CalibrationSet.open(tmp_path / "calib").calls()
    assert call.output.tolist() == [3.0, 3.0]


def damage(name):
    def truncate(folder):
        path = next(folder.glob("shard-*"))
        path.write_bytes(path.read_bytes()[:-3])

    def flip(folder):
        path = next(folder.glob("shard-*"))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    def edit(**fields):
        return lambda folder: edit_record(folder / "manifest.json", lambda record: record.update(fields))

    def outside(folder):
        path = next(folder.glob("shard-*"))
        path.symlink_to(path.replace(folder.parent / "elsewhere"))

    return {
        "truncated": truncate,
        "altered": flip,
        "missing": lambda folder: next(folder.glob("shard-*")).unlink(),
        "cannot be read as JSON": lambda folder: (folder / "manifest.json").write_text('{"calls": ['),
        "has no manifest": lambda folder: (folder / "manifest.json").unlink(),
        "format 99": lambda folder: edit_file(folder / "manifest.json", format_version=99),
        "manifest.json was altered": lambda folder: edit_file(folder / "manifest.json", record={}),
        "at calls": edit(calls=3),
        "at surprise": edit(surprise=1),
        "at shards.0.file": edit(shards=[{"file": "../x.safetensors", "size": 1, "sha256": "0", "tensors": []}]),
        "link that leads out": outside,
        "is empty": edit(calls=[]),
        "incomplete": edit(complete=False),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "truncated", "altered", "missing", "cannot be read as JSON", "has no manifest", "format 99", "at calls",
        "manifest.json was altered", "at surprise", "at shards.0.file", "link that leads out", "is empty", "incomplete",
    ],
)  # fmt: skip
def test_damaged_sets_are_refused(tmp_path, name):
    record_at(tmp_path, [9, 5])
    damage(name)(tmp_path)
    with pytest.raises(CalibrationError, match=name):
        CalibrationSet.open(tmp_path)


def test_opening_without_verification_still_sees_truncation(tmp_path):
    record_at(tmp_path, [9])
    damage("altered")(tmp_path)
    CalibrationSet.open(tmp_path, verify=False)
    damage("truncated")(tmp_path)
    with pytest.raises(CalibrationError, match="truncated"):
        CalibrationSet.open(tmp_path, verify=False)


def test_calls_of_a_timestep_can_be_counted_read_one_by_one_and_limited_one_by_one(tmp_path):
    schedule = (9.0, 5.0, 1.0)

    def sample(model):
        for seed in range(3):
            tiny_sampler(1, seed, schedule)(model)

    calib = record(tiny_denoiser(), sample, out=tmp_path / "calib", progress=False)
    assert calib.count(5.0) == 3
    second = list(calib.calls(5.0))[1]
    assert calib.call(5.0, 1).index == second.index
    assert torch.equal(calib.call(5.0, 1).output, second.output)
    with pytest.raises(CalibrationError, match="no number 3"):
        calib.call(5.0, 3)
    some = calib.subset(per_timestep={9.0: 1, 1.0: 2})
    assert [some.count(t) for t in schedule] == [1, 0, 2]


def test_a_few_samples_of_every_call(tmp_path):
    calib = record_at(tmp_path, [9, torch.tensor([5, 5, 5, 2]), 1], batch=4)
    few = calib.spread(3, samples=5)
    assert [len(call.output) for call in few.calls()] == [2, 2, 2]
    assert len({calib.hash, few.hash, calib.spread(3, samples=7).hash}) == 3
    for part in (few.subset(timesteps=[9]), few.spread(1)):
        assert all(len(call.output) == 2 for call in part.calls())
    whole = next(calib.calls())
    assert torch.equal(next(few.calls()).kwargs["x"], whole.kwargs["x"][[0, 2]])
    assert calib.spread(3, samples=99).hash != calib.hash
    assert [len(call.output) for call in calib.spread(3, samples=99).calls()] == [4, 4, 4]
