"""Every long stage, killed at every write: the same command goes on, loses one unit at most, ends in the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import dq_diffusers
import pytest
import torch
from crashes import State, survives_kills
from diffusers import DiTTransformer2DModel
from odes import recorded, velocity
from tiny_pipelines import class_pipeline
from torch import nn

import dq_plugins as dq
from dq_plugins.calibration import CalibrationSet
from dq_plugins.calibration.call import Call
from dq_plugins.cli import main
from dq_plugins.passes.allocation import exempt_layers
from dq_plugins.passes.rounding.gptq import GPTQ
from dq_plugins.passes.steps.fitness import SamplingFitness
from dq_plugins.quantized import learner as learning
from dq_plugins.quantized import resuming
from dq_plugins.recipe import Recipe, Step, pass_context
from dq_plugins.testing.denoiser import TinyDenoiser, example_inputs

TIMESTEPS = (900, 500, 100)
RANGES = (Step("weight-ranges"), Step("activation-ranges"))
WIDTHS = Step("sensitivity", {"draws": 4, "check_entries": 0, "weight_choices": (4, 8), "act_choices": (8,)})


@torch.no_grad()
def sample(denoiser: nn.Module) -> None:
    """A sampling run of three steps."""
    inputs = example_inputs()
    x = inputs["sample"]
    for t in TIMESTEPS:
        x = x - 0.2 * denoiser(sample=x, timestep=torch.tensor(t), condition=inputs["condition"])


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> tuple[TinyDenoiser, CalibrationSet]:
    denoiser = TinyDenoiser(width=8)
    return denoiser, dq.record(denoiser, sample, tmp_path_factory.mktemp("calib") / "calib", progress=False)


@pytest.fixture(scope="module")
def flow(tmp_path_factory) -> tuple[nn.Module, CalibrationSet]:
    denoiser = velocity()
    return denoiser, recorded(denoiser, "noise", tmp_path_factory.mktemp("flow"))


def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> Callable[[], int]:
    """Count the calls of a function or method from now on."""
    original, counter = getattr(owner, name), Counter[str]()

    @wraps(original)
    def counting(*args, **kwargs):
        found = original(*args, **kwargs)
        counter[name] += 1
        return found

    monkeypatch.setattr(owner, name, counting)
    return lambda: counter[name]


@pytest.fixture(autouse=True)
def traced_once(monkeypatch) -> None:
    """The graph of the denoiser is the same in every run, and takes longer to find than all the rest."""
    original, known = pass_context.partition, {}

    def cached(denoiser, *args, **kwargs):
        if id(denoiser) not in known:
            known[id(denoiser)] = denoiser, original(denoiser, *args, **kwargs)  # held, so that no other has its id
        return known[id(denoiser)][1]

    monkeypatch.setattr(pass_context, "partition", cached)


def plan_survives(
    case,
    tmp_path: Path,
    steps: tuple[Step, ...],
    units: Callable[[], int] = int,
    *,
    every: int = 1,
    all: bool = False,
    lost: int = 1,
):
    """Kill `make_plan` of these steps at every write of the last of them, or of all."""
    out = tmp_path / "out"
    last = None if all else out / "work" / f"{len(steps) - 1:02d}-{steps[-1].name}"

    def run() -> dict[str, bytes]:
        dq.make_plan(*case, Recipe("r", "", steps), weight_bits=4, out=out, progress=False)
        return {path.name: path.read_bytes() for path in out.iterdir()}

    states = survives_kills(run, out, tmp_path / "store", units=units, within=last, every=every, lost=lost)
    assert not (out / "work").exists()
    return states


def moments(states: list[State]) -> str:
    return "; ".join(state.moment for state in states)


def test_recording(case, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dq_plugins.calibration.writer.FREE_SECONDS", 60.0)
    denoiser, calibration = case
    calls = counted(monkeypatch, TinyDenoiser, "forward")
    out = tmp_path / "calib"

    def run() -> str:
        return dq.record(denoiser, sample, out, progress=False).hash

    states = survives_kills(run, out, tmp_path / "store", units=calls)
    assert run() == calibration.hash
    assert moments(states).count("in the middle of writing shard-") == len(TIMESTEPS)


def test_recording_over_an_old_recording(case, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dq_plugins.calibration.writer.FREE_SECONDS", 60.0)
    denoiser, out = TinyDenoiser(seed=1), tmp_path / "calib"
    dq.record(case[0], sample, out, progress=False)

    def run() -> str:
        return dq.record(denoiser, sample, out, overwrite=True, progress=False).hash

    survives_kills(run, out, tmp_path / "store")


def test_statistics(case, tmp_path, monkeypatch) -> None:
    plan_survives(case, tmp_path, RANGES, counted(monkeypatch, Call, "run"), every=3, all=True)


def test_sensitivity(flow, tmp_path, monkeypatch) -> None:
    units = counted(monkeypatch, __import__("dq_plugins.sensitivity.measure", fromlist=["_measured"]), "_measured")
    plan_survives(flow, tmp_path, (RANGES[0], WIDTHS), units, every=9)
    assert units() > 6


def test_gptq(case, tmp_path, monkeypatch) -> None:
    sweeps = counted(monkeypatch, GPTQ, "_inputs")
    plan_survives(case, tmp_path, (RANGES[0], Step("gptq", {"memory_mb": 16})), sweeps, every=2)


@pytest.mark.parametrize(
    "step",
    [
        Step("block-reconstruction", {"iterations": 3, "calls": 2}),
        Step("temporal-reconstruction", {"iterations": 3}),
        Step("learned-ranges", {"target": "block", "passes": 1.5, "calls": 2}),
        Step("learned-ranges", {"target": "denoiser", "passes": 1.5}),
    ],
    ids=lambda step: f"{step.name}-{step.options.get('target', '')}",
)
def test_learning(case, tmp_path, monkeypatch, step: Step) -> None:
    monkeypatch.setattr(resuming, "KEPT_EVERY_S", 0.0)
    iterations = counted(monkeypatch, learning.Learner, "_step")
    plan_survives(case, tmp_path, (*RANGES, step), iterations, every=7)
    assert iterations() > 6


def test_exempt_layers(case, tmp_path, monkeypatch) -> None:
    tried = counted(monkeypatch, exempt_layers, "output_error")
    plan_survives(case, tmp_path, (*RANGES, Step("exempt-layers", {"calls": 2})), tried, every=2)


SEARCH = {"generations": 1, "population": 3, "parents": 2, "mutants": 2, "crossovers": 1, "seconds": 0.5, "steps": (3,)}


def test_search(flow, tmp_path, monkeypatch) -> None:
    scores = counted(monkeypatch, SamplingFitness, "__call__")
    step = Step("timestep-reduction", {**SEARCH, "search": "evolution"})
    plan_survives(flow, tmp_path, (*RANGES, WIDTHS, step), scores, every=13)
    assert scores() > 6


def test_super_network(flow, tmp_path, monkeypatch) -> None:
    iterations = counted(monkeypatch, learning.Learner, "_step")
    learn = {"calibration": "random", "iterations": 2, "search": "exact"}
    plan_survives(
        flow, tmp_path, (*RANGES, WIDTHS, Step("timestep-reduction", SEARCH | learn)), iterations, every=12, lost=2
    )
    assert iterations() > 6


@pytest.fixture
def command(tmp_path, capsys) -> Callable[[], dict[str, bytes | int]]:
    """`dq-plugins quantize` into ``tmp_path / "out"``; gives what it wrote."""
    model, out = tmp_path / "model", tmp_path / "out"
    class_pipeline().save_pretrained(model)
    options = ["--steps", "2", "--images", "1", "--recipe", "fast", "--classes", "1"]

    def run() -> dict[str, bytes | int]:
        assert main(["quantize", str(model), "--out", str(out), *options]) == 0, capsys.readouterr().err
        # shards of calls end where a kill came; safetensors writes the metadata that diffusers gives it in any order
        plan = {path.name: path.read_bytes() for path in (out / "plan").iterdir()}
        pipeline = [path for path in (out / "pipeline").rglob("*") if path.is_file()]
        return plan | {str(path.relative_to(out)): path.stat().st_size for path in pipeline}

    return run


def test_quantize_from_the_command_line(command, tmp_path) -> None:
    out = tmp_path / "out"
    survives_kills(command, out, tmp_path / "store", within=out / "plan", every=12)


def test_quantize_from_the_command_line_while_it_records(command, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dq_plugins.calibration.writer.FREE_SECONDS", 60.0)
    calls, out = counted(monkeypatch, DiTTransformer2DModel, "forward"), tmp_path / "out"
    states = survives_kills(command, out, tmp_path / "store", units=calls, within=out / "calib", every=7)
    assert {state.units for state in states} >= {0, 1}


def test_quantize_of_a_pipeline_while_it_records(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dq_plugins.calibration.writer.FREE_SECONDS", 60.0)
    calls, work = counted(monkeypatch, DiTTransformer2DModel, "forward"), tmp_path / "work"

    def run() -> str:
        settings = {"steps": 2, "images": 2, "batch": 1, "progress": False}
        return dq_diffusers.quantize(class_pipeline(), "fast", workdir=work, **settings).hash

    states = survives_kills(run, work, tmp_path / "store", units=calls, within=work / "calib", every=9)
    assert len({state.units for state in states}) > 3
