from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from dq_plugins import make_plan
from dq_plugins.calibration import record
from dq_plugins.errors import CalibrationError, TimestepError
from dq_plugins.observers import observe_groups
from dq_plugins.observers.minmax import MinMaxObserver
from dq_plugins.quantized.statistics import Collector, collect, input_statistics
from dq_plugins.timesteps import TimestepGroups


def test_histograms_exist_for_one_timestep_at_a_time(denoiser, calib, monkeypatch):
    alive, most = weakref.WeakSet(), []

    class Counted(input_statistics.Histogram):
        def __init__(self, bins):
            super().__init__(bins)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(input_statistics, "Histogram", Counted)
    collect(denoiser, calib, ["moves", "still"])
    assert len(most) == 2 * len(calib.timesteps)
    assert max(most) == 2
    assert not alive


def test_an_interrupted_collection_goes_on_where_it_stopped(denoiser, calib, tmp_path):
    whole = collect(denoiser, calib, ["moves"], folder=tmp_path / "whole")
    denoiser.calls = 0
    folder = tmp_path / "part"
    stop_at = 5  # calls; two a timestep, so two timesteps are finished and a third has begun

    def stop(module, *_):
        if module.calls == stop_at:
            raise KeyboardInterrupt

    handle = denoiser.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        collect(denoiser, calib, ["moves"], folder=folder)
    handle.remove()
    denoiser.calls = 0
    resumed = collect(denoiser, calib, ["moves"], folder=folder)
    assert denoiser.calls == 2 * 3
    assert torch.equal(resumed.error_table("moves", 4).error, whole.error_table("moves", 4).error)


def test_other_layers_in_the_same_folder_are_collected_again(denoiser, calib, tmp_path):
    collect(denoiser, calib, ["moves"], folder=tmp_path)
    assert int(collect(denoiser, calib, ["still"], folder=tmp_path).count("still").sum()) == 2 * 2 * 5 * 5


def test_collecting_twice_gives_the_same_bits(denoiser, calib):
    a, b = (collect(denoiser, calib, ["moves"]).error_table("moves", 8) for _ in range(2))
    assert torch.equal(a.error, b.error)


def test_the_denoiser_is_left_as_it_was_found(denoiser, calib):
    denoiser.train()
    denoiser.still.eval()
    collect(denoiser, calib, ["moves"])
    assert denoiser.moves.training
    assert not denoiser.still.training
    assert not denoiser.moves._forward_pre_hooks


def test_inputs_are_those_of_evaluation_before_any_hook_of_the_layer(denoiser, calib):
    expected = collect(denoiser, calib, ["moves"]).high("moves")
    denoiser.moves.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {"input": kwargs["input"] * 9}), with_kwargs=True
    )
    denoiser.register_forward_pre_hook(
        lambda m, args, kwargs: (args, {**kwargs, "x": kwargs["x"] * (5 if m.training else 1)}), with_kwargs=True
    )
    denoiser.train()
    assert torch.equal(collect(denoiser, calib, ["moves"]).high("moves"), expected)


def test_nan_inputs_name_layer_and_timestep(denoiser, calib):
    def spoil(module, args, kwargs):
        if float(kwargs["t"]) == 500:
            kwargs["x"] = kwargs["x"] * torch.nan
        return args, kwargs

    denoiser.register_forward_pre_hook(spoil, with_kwargs=True)
    with pytest.raises(CalibrationError, match=r"layer 'moves' at timestep 500: 384 of 384 activations are NaN"):
        collect(denoiser, calib, ["moves"])
    assert not denoiser.moves._forward_pre_hooks


def test_unknown_and_unused_layers_are_named(denoiser, calib):
    with pytest.raises(CalibrationError, match="has no layer 'move'; did you mean 'moves'"):
        collect(denoiser, calib, ["move"])
    with pytest.raises(CalibrationError, match=r"'unused' .* did not run in any recorded call"):
        collect(denoiser, calib, ["moves", "unused"])
    with pytest.raises(CalibrationError, match="no statistics were collected for layer 'still'"):
        collect(denoiser, calib, ["moves"]).low("still")


def test_any_observer_gives_ranges_by_group(denoiser, calib):
    groups = TimestepGroups((200.0, 800.0))
    low, high = observe_groups(denoiser, calib, ["moves"], lambda _: MinMaxObserver(symmetric=False), groups)["moves"]
    found = collect(denoiser, calib, ["moves"])
    assert high.tolist() == [float(found.high("moves")[s].max()) for s in (slice(0, 1), slice(1, 4), slice(4, 5))]
    assert low.tolist() == [float(found.low("moves")[s].min()) for s in (slice(0, 1), slice(1, 4), slice(4, 5))]


def test_a_group_without_recorded_timesteps_has_the_range_of_all(denoiser, calib):
    groups = TimestepGroups((110.0, 120.0))
    _, high = observe_groups(denoiser, calib, ["moves"], lambda _: MinMaxObserver(), groups)["moves"]
    assert float(high[1]) == float(high.max())


def test_samples_with_their_own_timesteps_are_told_apart(denoiser, tmp_path):
    def sample(d):
        d(torch.ones(3, 3, 8, 8), torch.tensor([900, 100, 900]), torch.zeros(3, 5))

    calib = record(denoiser, sample, tmp_path, progress=False)
    found = collect(denoiser, calib, ["moves"])
    assert found.high("moves").tolist() == [1.0, 9.0]
    assert found.count("moves").tolist() == [192, 384]


def test_a_timestep_that_is_visited_again_goes_on_where_it_was(tmp_path):
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    visits = [(900, 0), (100, 1), (900, 2), (100, 0)]
    many, once = Collector(), Collector()
    for t, row in visits:
        many.see("layer", x[row], t)
    once.see("layer", x[[0, 2]], 900)
    once.see("layer", x[[1, 0]], 100)
    a, b = (c.statistics(["layer"]) for c in (many, once))
    assert a.timesteps == (100.0, 900.0)
    assert torch.equal(a.error_table("layer", 4).error, b.error_table("layer", 4).error)
    assert a.mean_square("layer").tolist() == pytest.approx(b.mean_square("layer").tolist(), rel=1e-6)  # float32


def test_only_the_running_timesteps_are_in_memory(tmp_path):
    collector = Collector(tmp_path)
    for t in (900, 700, 500):
        collector.see("layer", torch.ones(2), t)
        assert len(list(tmp_path.iterdir())) == {900: 0, 700: 1, 500: 2}[t]


def test_rows_of_samples_with_their_own_timesteps_are_told_apart():
    collector = Collector()
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])  # two rows a sample
    with pytest.raises(TimestepError, match="which rows"):
        collector.see("layer", x, torch.tensor([900, 100, 900]))
    collector.rows = {"layer": "first"}
    collector.see("layer", x, torch.tensor([900, 100, 900]))
    found = collector.statistics(["layer"])
    assert found.low("layer").tolist() == [3.0, 1.0]
    assert found.high("layer").tolist() == [4.0, 6.0]
    assert found.count("layer").tolist() == [2, 4]


def test_files_of_another_source_count_as_absent(tmp_path):
    first = Collector(tmp_path, source={"calibration": "one"})
    first.see("layer", torch.ones(4), 900)
    first.visit(())
    assert Collector(tmp_path, source={"calibration": "one"}).holds(900.0)
    other = Collector(tmp_path, source={"calibration": "two"})
    other.see("layer", torch.zeros(3), 900)
    assert other.statistics(["layer"]).count("layer").tolist() == [3]


def test_a_damaged_file_is_collected_again(denoiser, calib, tmp_path):
    folder = tmp_path / "statistics"
    whole = collect(denoiser, calib, ["moves"], folder=folder)
    file = sorted(folder.iterdir())[0]
    data = bytearray(file.read_bytes())
    data[-3] ^= 1  # of a sum
    file.write_bytes(data)
    again = collect(denoiser, calib, ["moves"], folder=folder)
    assert again.hash == collect(denoiser, calib, ["moves"]).hash
    assert torch.equal(again.low("moves"), whole.low("moves"))


def test_a_layer_that_runs_at_some_timesteps_only_has_its_range_in_the_groups_of_the_others(tmp_path):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.late = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, t):
            return (self.early if float(t.max()) > 400 else self.late)(x)

    def sample(model):
        for t in (900.0, 500.0, 100.0):
            model(torch.full((1, 4), t / 100), torch.tensor([t]))

    calls = record(Branches(), sample, tmp_path, progress=False)
    assert collect(Branches(), calls, ["early", "late"]).count("late").tolist() == [4, 0, 0]
    for recipe in ("fast", "ranges"):
        options = {"timestep-groups": {"groups": 3}} if recipe == "fast" else {}
        torch.manual_seed(0)
        model = Branches()
        calls = record(model, sample, tmp_path / recipe, progress=False)
        plan = make_plan(model, calls, recipe, options=options, progress=False)
        assert (plan.layers["early"].activation.scale > 1e-2).all(), recipe
