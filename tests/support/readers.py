"""Everything that is read from disk: a whole file of each kind, and what reads it and uses what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import dq_brevitas.files
import dq_torchao
import torch
from dq_diffusers.building import find_config, read_config
from dq_torchao.config_data import config_from_json
from dq_torchao.plan_config import PlanConfig
from mutations import Recording, SealedCheckpoint, SealedFile, change_bytes, change_record
from plans import example_plan
from torchao.core.config import config_to_dict

import dq_plugins as dq
from dq_plugins.passes.binarization.checkpoint import CHECKPOINT, TrainingState
from dq_plugins.passes.ranges.search.learn import STATE as GROUP_SEARCH
from dq_plugins.passes.ranges.search.learn import GroupSearchState
from dq_plugins.passes.rounding.block_reconstruction import BLOCK
from dq_plugins.passes.rounding.gptq import SWEEP
from dq_plugins.passes.steps.evolution import STATE as EVOLUTION
from dq_plugins.passes.steps.evolution import SearchState
from dq_plugins.plan import PLAN, WeightQuant
from dq_plugins.quantized import resuming
from dq_plugins.quantized.learned_values import LearnedUnit
from dq_plugins.quantized.learner import Learner
from dq_plugins.quantized.statistics import TIMESTEP, InputStatistics
from dq_plugins.recipe import Recipe, Step, pass_context
from dq_plugins.sensitivity.measure import MEASURED
from dq_plugins.testing.denoiser import TinyDenoiser, example_inputs, sample

READS = 100


@dataclass
class Reader:
    """One kind of file.

    Attributes:
        change: puts a changed file in the place of the whole one.
        read: reads it, and uses what it says.
    """

    change: Callable[[Random], object]
    read: Callable[[], object]


def readers(folder: Path) -> dict[str, Reader]:
    """Every kind, with whole files of it in a folder of their own."""
    model = TinyDenoiser()
    calibration = dq.record(model, sample, out=folder / "calibration", progress=False)
    plan = dq.make_plan(model, calibration, "fast", progress=False, workdir=folder / "work")
    found = {
        "recording": _reader(Recording(folder / "calibration/manifest.json"), lambda: _replay(folder / "calibration")),
        "plan": _reader(SealedFile(plan.save(folder / "plan") / "plan.json"), lambda: _apply(folder / "plan")),
        "plan with everything": _reader(
            SealedFile(example_plan().save(folder / "full") / "plan.json"),
            lambda: repr(dq.QuantPlan.load(folder / "full")),
        ),
        "torchao": _torchao(plan, folder / "torchao"),
        "brevitas": _brevitas(plan, folder / "brevitas"),
        "config of diffusers": _config(folder / "diffusers"),
        "plan in a config": _embedded(plan, folder / "embedded"),
    }
    shutil.copytree(folder / "calibration", folder / "own")  # the other changes, and this one is read where it lies
    own = dq.CalibrationSet.open(folder / "own")
    return found | _states(folder) | {"interrupted run": _interrupted(model, own, folder / "interrupted")}


def _reader(file: SealedFile, read: Callable[[], object]) -> Reader:
    return Reader(file.change, read)


def _replay(folder: Path) -> None:
    opened = dq.CalibrationSet.open(folder)
    for call in opened.calls():
        call.rows(torch.tensor([0]), 2)
    opened.example_inputs()


def _run(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model(**example_inputs())


def _apply(folder: Path) -> None:
    plan = dq.QuantPlan.load(folder)
    repr(plan)
    _run(dq.apply(TinyDenoiser(), plan, "simulate", inplace=True))


def _torchao(plan: dq.QuantPlan, folder: Path) -> Reader:
    dq_torchao.save(dq.apply(TinyDenoiser(), plan, "torchao"), folder)
    file = SealedCheckpoint(folder / "model.safetensors")
    return _reader(file, lambda: _run(dq_torchao.load(TinyDenoiser(), folder)))


def _brevitas(plan: dq.QuantPlan, folder: Path) -> Reader:
    dq_brevitas.files.save(dq.apply(TinyDenoiser(), plan, "brevitas"), folder)
    targets: list[torch.nn.Module] = []

    def read() -> None:
        # one for many, as it takes long to make; not for ever: Brevitas makes classes with every state that it loads
        if len(targets) == READS:
            targets.clear()
        targets.append(targets[-1] if targets else dq.apply(TinyDenoiser(), plan, "brevitas"))
        _run(dq_brevitas.files.load(targets[-1], folder))

    return _reader(SealedFile(folder / "model.safetensors"), read)


def _config(folder: Path) -> Reader:
    folder.mkdir()
    file = folder / "config.json"
    whole = {
        "_class_name": "DiTTransformer2DModel", "num_attention_heads": 1, "attention_head_dim": 8, "in_channels": 4,
        "num_layers": 1, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_eps": 1e-5,
        "dropout": 0.0, "activation_fn": "gelu-approximate",
    }  # fmt: skip

    def change(rng: Random) -> None:
        if rng.randrange(2):
            file.write_bytes(change_bytes(rng, json.dumps(whole).encode()))
        else:
            file.write_text(json.dumps(change_record(rng, deepcopy(whole))))

    # building is diffusers' affair: it makes as many blocks and channels as a config says
    return Reader(change, lambda: read_config(find_config(folder)))


def _embedded(plan: dq.QuantPlan, folder: Path) -> Reader:
    whole, current = config_to_dict(PlanConfig(plan)), []

    def change(rng: Random) -> None:
        current[:] = [change_record(rng, json.loads(json.dumps(whole)))]

    return Reader(change, lambda: config_from_json(current[0], PlanConfig).resolve())


def _interrupted(model: torch.nn.Module, calibration: dq.CalibrationSet, folder: Path) -> Reader:
    """A run that was killed in its last block: what was found of the others, and how far this one was."""
    options = {"iterations": 3, "calls": 1}
    recipe = Recipe("interrupted", "", (Step("weight-ranges"), Step("block-reconstruction", options)))
    step, steps, traced = Learner._step, count(), pass_context.partition(model, calibration.example_inputs())

    def run(place: Path) -> None:
        with patch.object(pass_context, "partition", lambda *_, **__: traced):
            dq.make_plan(model, calibration, recipe, weight_bits=4, workdir=place, progress=False)

    def interrupt(*args: Any) -> None:
        if next(steps) >= 14:
            raise KeyboardInterrupt
        step(*args)

    with suppress(KeyboardInterrupt), patch.object(Learner, "_step", interrupt):  # noqa: SIM117
        with patch.object(resuming, "KEPT_EVERY_S", 0.0):
            run(folder)
    files = [SealedFile(path) for path in sorted((folder / "01-block-reconstruction").glob("*.safetensors"))]
    assert len(files) == 5

    def read() -> None:
        with TemporaryDirectory(dir=folder.parent) as place:
            run(shutil.copytree(folder, Path(place) / "work"))

    return Reader(lambda rng: rng.choice(files).change(rng), read)


def _states(folder: Path) -> dict[str, Reader]:
    """Results and states that passes keep while they run."""
    tensor = torch.arange(6.0).reshape(2, 3)
    optimizer = {"0": {"step": torch.tensor(3.0), "exp_avg": tensor}}
    statistics = InputStatistics()
    statistics.update(torch.randn(100))
    values: dict[str, tuple[Any, Any]] = {
        "statistics": (TIMESTEP, {"up": statistics.record}),
        "measurement": (MEASURED, {"signal": 3.0, "up@4": 0.5}),
        "block": (BLOCK, LearnedUnit({"start": 1.0, "kept_start": False}, {"up": {"weight": tensor}})),  # type: ignore[dict-item]
        "sweep": (SWEEP, {"up": WeightQuant(4, torch.ones(2), codes=torch.zeros(2, 3, dtype=torch.int8))}),
        "group search": (GROUP_SEARCH, GroupSearchState(3, {"0": tensor}, optimizer)),
        "evolution": (EVOLUTION, SearchState(1, [], {"a"}, [1.0], [3], 2.0, {"state": 1})),
        "training": (CHECKPOINT, TrainingState(1, {"w": tensor}, optimizer, {"x": tensor}, {"loss": [1.0]})),
    }
    found = {}
    for name, (format, value) in values.items():
        path = format.write(folder / name / "state.safetensors", value)

        def read(format: Any = format, path: Path = path) -> None:
            value = format.read(path)
            if format is TIMESTEP:
                for record in value.values():
                    merged = InputStatistics.of(record)
                    merged.merge(statistics)
                    merged.histogram.points()

        found[name] = _reader(SealedFile(path), read)
    assert PLAN.name == "plan"
    return found
