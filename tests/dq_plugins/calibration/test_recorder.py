from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dq_plugins.calibration import CalibrationSet, record
from dq_plugins.errors import CalibrationError, TimestepError
from dq_plugins.quantized.statistics import collect


@dataclass
class Output:
    sample: Tensor
    auxiliary: Tensor | None = None


class Denoiser(nn.Module):
    """Counts what it computes, so that a test can tell a replayed call from a computed one."""

    def __init__(self, broken_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 3, 1)
        self.drop = nn.Dropout(0.5)
        self.computed = 0
        self.broken_at = broken_at

    def forward(self, sample, timestep, cond=None, extra=None, return_dict=True):
        self.computed += 1
        t = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1, 1, 1)
        out = self.drop(self.conv(sample)) * (1 + t / 1000)
        if cond is not None:
            out = out + cond.mean()
        if self.computed == self.broken_at:
            out = out * float("nan")
        return Output(out) if return_dict else (out,)


class StopError(Exception):
    pass


def sampler(steps=(900, 600, 300, 0), *, seed=0, stop_after=None, batches=1, return_dict=True):
    """Euler-like sampling; ``stop_after`` interrupts it the way a user or a crash would."""

    def sample(denoiser):
        generator = torch.Generator().manual_seed(seed)
        cond, made = torch.ones(2, 5), 0
        for _ in range(batches):
            x = torch.randn(2, 3, 4, 4, generator=generator)
            for t in steps:
                if made == stop_after:
                    raise StopError
                out = denoiser(x, torch.tensor(t), cond=cond, extra={"size": [8, 8]}, return_dict=return_dict)
                x = x - 0.1 * (out.sample if return_dict else out[0])
                made += 1

    return sample


def test_records_every_call_with_arguments_and_output(tmp_path):
    denoiser = Denoiser().eval()
    calib = record(denoiser, sampler(), tmp_path / "calib")
    assert len(calib) == 4
    assert calib.timesteps == (0.0, 300.0, 600.0, 900.0)
    assert calib.schedule.timesteps == (900.0, 600.0, 300.0, 0.0)
    for call in calib.calls():
        assert torch.equal(call.run(denoiser), call.output)
        assert set(call.inputs) == {"sample", "timestep", "cond", "extra.size.0", "extra.size.1", "return_dict"}
        assert call.kwargs["extra"] == {"size": [8, 8]}


def test_repeated_tensors_are_stored_once(tmp_path):
    record(Denoiser(), sampler(), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())["record"]
    stored = [key for shard in manifest["shards"] for key in shard["tensors"]]
    # Four samples, four timesteps, four outputs, one condition.
    assert len(stored) == len(set(stored)) == 13


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("stop_after", [1, 5])
def test_resumes_without_computing_what_is_recorded(tmp_path, stop_after, return_dict):
    denoiser = Denoiser()
    options = {"batches": 2, "return_dict": return_dict}
    with pytest.raises(StopError):
        record(denoiser, sampler(stop_after=stop_after, **options), tmp_path / "a")
    with pytest.raises(CalibrationError, match=f"holds {stop_after} calls and is incomplete.*[Rr]esume"):
        CalibrationSet.open(tmp_path / "a")
    resumed = Denoiser()
    calib = record(resumed, sampler(**options), tmp_path / "a")
    assert resumed.computed == 8 - stop_after
    assert calib.hash == record(Denoiser(), sampler(**options), tmp_path / "b").hash


def test_recording_again_checks_without_computing(tmp_path):
    first = record(Denoiser(), sampler(), tmp_path)
    denoiser = Denoiser()
    assert record(denoiser, sampler(), tmp_path).hash == first.hash
    assert denoiser.computed == 0


def test_a_longer_run_of_the_same_sampler_extends_the_recording(tmp_path):
    record(Denoiser(), sampler(), tmp_path)
    denoiser = Denoiser()
    assert len(record(denoiser, sampler(batches=2), tmp_path)) == 8
    assert denoiser.computed == 4


def test_a_shorter_run_is_refused_and_leaves_the_recording_complete(tmp_path):
    record(Denoiser(), sampler(batches=2), tmp_path)
    with pytest.raises(CalibrationError, match=r"made 4 denoiser calls.*already holds 8"):
        record(Denoiser(), sampler(), tmp_path)
    assert len(CalibrationSet.open(tmp_path)) == 8


def test_resuming_with_another_seed_names_the_argument_and_says_to_seed(tmp_path):
    with pytest.raises(StopError):
        record(Denoiser(), sampler(stop_after=2), tmp_path)
    with pytest.raises(CalibrationError, match=r"call 0 \(timestep 900\).*argument sample differs by up to.*seed it"):
        record(Denoiser(), sampler(seed=5), tmp_path)


def test_resuming_with_another_schedule_is_refused(tmp_path):
    record(Denoiser(), sampler(), tmp_path)
    with pytest.raises(CalibrationError, match="argument timestep differs by up to 100"):
        record(Denoiser(), sampler(steps=(800, 1)), tmp_path)


def test_overwrite_begins_again_and_spares_files_of_others(tmp_path):
    record(Denoiser(), sampler(batches=2), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert len(record(Denoiser(), sampler(seed=5), tmp_path, overwrite=True)) == 4
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwriting_that_is_killed_at_any_file_can_be_done_again(tmp_path, monkeypatch):
    record(Denoiser(), sampler(batches=2), tmp_path)
    unlink = Path.unlink

    def killed(path, **options):
        unlink(path, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            record(Denoiser(), sampler(seed=5), tmp_path, overwrite=True)
    assert len(record(Denoiser(), sampler(seed=5), tmp_path, overwrite=True)) == 4
    named = {shard["file"] for shard in json.loads((tmp_path / "manifest.json").read_text())["record"]["shards"]}
    assert {path.name for path in tmp_path.glob("shard-*")} == named


def test_other_weights_are_refused(tmp_path):
    record(Denoiser(), sampler(), tmp_path)
    other = Denoiser()
    other.conv.weight.data += 1
    with pytest.raises(CalibrationError, match="recorded from another denoiser: its model_hash"):
        record(other, sampler(), tmp_path)


@pytest.mark.parametrize("stop_after", [None, 2])
def test_the_denoiser_is_left_as_it_was_found(tmp_path, stop_after):
    denoiser = Denoiser()
    denoiser.conv.eval()
    hooks = [denoiser.register_forward_hook(lambda *_: None)]
    try:
        record(denoiser, sampler(stop_after=stop_after), tmp_path)
    except StopError:
        assert stop_after == 2
    assert denoiser.training
    assert not denoiser.conv.training
    assert denoiser.drop.training
    assert "forward" not in vars(denoiser)
    assert list(denoiser._forward_hooks) == [hooks[0].id]


def test_a_forward_set_on_the_instance_is_kept(tmp_path):
    denoiser = Denoiser()
    inner, calls = denoiser.forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    denoiser.forward = forward
    calib = record(denoiser, lambda d: d(torch.zeros(1, 3, 2, 2), timestep=5), tmp_path, timestep="timestep")
    assert denoiser.forward is forward
    assert len(calls) == len(calib) == 1


def test_nan_names_call_timestep_and_tensor_and_keeps_what_came_before(tmp_path):
    with pytest.raises(CalibrationError, match=r"call 2 \(timestep 300\): output\.sample holds 96 values.*NaN"):
        record(Denoiser(broken_at=3), sampler(), tmp_path)
    denoiser = Denoiser()
    assert len(record(denoiser, sampler(), tmp_path)) == 4
    assert denoiser.computed == 2


def test_infinite_arguments_are_named(tmp_path):
    with pytest.raises(CalibrationError, match=r"argument sample holds 12 values that are NaN or infinite"):
        record(Denoiser(), lambda d: d(torch.full((1, 3, 2, 2), torch.inf), 1), tmp_path)


def test_a_sampler_that_never_calls_is_an_error(tmp_path):
    with pytest.raises(CalibrationError, match="never called the denoiser"):
        record(Denoiser(), lambda _: None, tmp_path)


def test_a_denoiser_without_timestep_is_an_error(tmp_path):
    with pytest.raises(TimestepError, match=r"Linear\.forward has no argument"):
        record(nn.Linear(2, 2), lambda d: d(torch.zeros(1, 2)), tmp_path)


@pytest.mark.parametrize("timestep", [torch.zeros(0), None, torch.tensor(torch.nan)])
def test_malformed_timesteps_are_errors(tmp_path, timestep):
    with pytest.raises(TimestepError, match="called with"):
        record(Denoiser(), lambda d: d(torch.zeros(2, 3, 2, 2), timestep), tmp_path)


def test_arguments_that_cannot_be_recorded_are_named(tmp_path):
    with pytest.raises(CalibrationError, match="argument extra is a Generator"):
        record(Denoiser(), lambda d: d(torch.zeros(1, 3, 2, 2), 1, extra=torch.Generator()), tmp_path)


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(CalibrationError, match="is not empty and is not a calibration set"):
        record(Denoiser(), sampler(), tmp_path)
    with pytest.raises(CalibrationError, match="is a file"):
        record(Denoiser(), sampler(), tmp_path / "thesis.tex")


def test_inputs_changed_in_place_by_the_sampler_are_recorded_as_they_were(tmp_path):
    def sample(denoiser):
        x = torch.ones(1, 3, 2, 2)
        for t in (2, 1):
            x += denoiser(x, t).sample

    denoiser = Denoiser().eval()
    first, second = record(denoiser, sample, tmp_path).calls()
    assert torch.equal(first.kwargs["sample"], torch.ones(1, 3, 2, 2))
    assert torch.equal(second.kwargs["sample"], 1 + first.output)


def test_a_compiled_denoiser_records_like_its_module(tmp_path):
    plain = record(Denoiser(), sampler(), tmp_path / "plain")
    compiled = torch.compile(Denoiser(), backend="eager")
    calib = record(compiled, sampler(), tmp_path / "compiled")
    assert calib.model_hash == plain.model_hash
    assert calib.schedule == plain.schedule


def test_shards_split_and_a_kill_without_warning_loses_nothing_flushed(tmp_path, monkeypatch):
    monkeypatch.setattr("dq_plugins.calibration.writer.SHARD_BYTES", 1)
    seen = []

    def sample(denoiser):
        for _ in sampler(batches=1)(denoiser) or [None]:
            seen.append(json.loads((tmp_path / "manifest.json").read_text())["record"])

    calib = record(Denoiser(), sample, tmp_path)
    assert len(seen[0]["calls"]) == 4
    assert not seen[0]["complete"]
    assert len(list(tmp_path.glob("shard-*"))) == 4
    stored = [key for shard in seen[0]["shards"] for key in shard["tensors"]]
    assert len(stored) == len(set(stored)) == 13
    assert calib.hash == record(Denoiser(), sampler(), tmp_path / "whole").hash


def test_one_process_records_into_a_folder_at_a_time(tmp_path):
    def with_another(denoiser):
        with pytest.raises(CalibrationError, match="another process is writing to"):
            record(Denoiser(), sampler(), tmp_path, progress=False)
        sampler()(denoiser)

    assert len(record(Denoiser(), with_another, tmp_path, progress=False)) == 4


def test_a_pipeline_that_takes_its_hooks_off_and_on_between_calls_is_recorded_whole(tmp_path):
    """Offloading sets the forward of the instance to the one it found, and wraps it again for the next image."""
    denoiser = Denoiser()
    found = denoiser.forward

    def sample(d):
        for t in (900, 500, 100):
            d(torch.zeros(1, 3, 2, 2), timestep=t)
            d.forward = found

    denoiser.forward = lambda *args, **kwargs: found(*args, **kwargs)
    assert len(record(denoiser, sample, tmp_path)) == 3
    assert type(denoiser) is Denoiser
    assert denoiser.forward is found


def test_a_denoiser_compiled_in_place_is_recorded_as_it_is_written(tmp_path):
    torch._dynamo.reset()
    denoiser = Denoiser()
    denoiser.compile(backend="eager")
    compiled = denoiser._compiled_call_impl
    calib = record(denoiser, sampler(), tmp_path / "a")
    assert denoiser._compiled_call_impl is compiled is not None
    assert len(calib) == len(record(Denoiser(), sampler(), tmp_path / "b"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_timestep_expanded_to_a_batch_of_one_is_recorded(tmp_path, dtype):
    t = torch.tensor(500, dtype=dtype).expand(1)
    calib = record(Denoiser(), lambda d: d(torch.zeros(1, 3, 2, 2), timestep=t), tmp_path)
    assert calib.timesteps == (500,)


class Tokens(nn.Module):
    """One timestep per token; a layer that sees the tokens, and one that sees a text."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.text = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, t, text):
        return self.body(x * (1 + t[..., None])) + self.text(text).mean(1, keepdim=True)


def test_tokens_have_timesteps_of_their_own(tmp_path):
    denoiser = Tokens()
    x, text = torch.ones(2, 3, 4), torch.full((2, 5, 4), 0.5)

    def sample(model):
        for t in (9.0, 4.0):
            model(x, torch.tensor([[0.0, t, t], [0.0, 0.0, t]]), text)

    calls = record(denoiser, sample, tmp_path, progress=False)
    assert calls.timesteps == (0.0, 4.0, 9.0)
    assert [schedule.timesteps for schedule in calls.schedules] == [(9.0, 4.0)]
    found = collect(denoiser, calls, ["body", "text"])
    assert found.count("body").tolist() == [2 * 3 * 4, 3 * 4, 3 * 4]  # values of tokens at 0, 4, 9
    assert found.high("body").tolist() == [1, 5, 10]
    assert found.count("text").tolist() == [0, 2 * 5 * 4, 2 * 5 * 4]  # a text is at the largest of its sample


def test_a_timestep_inside_another_argument(tmp_path):
    class Batch(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, batch):
            return self.body(batch["x"]) * batch["t"]

    calls = record(
        Batch(),
        lambda model: [model({"x": torch.ones(1, 4), "t": torch.tensor(t)}) for t in (9.0, 4.0)],
        tmp_path,
        progress=False,
        timestep="batch.t",
    )
    assert calls.timesteps == (4.0, 9.0)
    with pytest.raises(TimestepError, match="t=None|batch.u=None"):
        record(Batch(), lambda m: m({"x": torch.ones(1, 4), "t": 1.0}), tmp_path / "u", timestep="batch.u")


def test_settings_that_differ_from_those_of_the_recording_are_named(tmp_path):
    def asked(**settings):
        sample = sampler(steps=settings.pop("steps"))
        return type("Asked", (), {"settings": settings, "__call__": lambda self, denoiser: sample(denoiser)})()

    record(Denoiser(), asked(steps=(900, 1), seed="0", images="2"), tmp_path, progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CalibrationError, match=r"recorded with other settings: seed is 1 here and 0 there \(call"):
        record(Denoiser(), asked(steps=(800, 1), seed="1", images="2"), tmp_path, progress=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(record(Denoiser(), asked(steps=(900, 1), seed="0", images="2"), tmp_path, progress=False)) > 0


def test_dictionaries_with_whole_numbers_as_keys_are_recorded_and_given_back(tmp_path):
    class Residuals(nn.Module):
        def forward(self, x, t, sizes):
            return {0: x * t, 3: [x + sizes[1][0]]}

    sizes = {1: [2.0, torch.ones(1)], 0: []}
    record(Residuals(), lambda d: d(torch.ones(1, 2), torch.tensor([5.0]), sizes), tmp_path)
    call = next(CalibrationSet.open(tmp_path).calls())
    assert list(call.kwargs["sizes"]) == [1, 0]
    assert call.kwargs["sizes"][0] == []
    assert torch.equal(call.kwargs["sizes"][1][1], torch.ones(1))
    assert torch.equal(call.run(Residuals()), call.output)
