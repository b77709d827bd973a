from __future__ import annotations

from itertools import count
from typing import ClassVar

import pytest
import torch

from dq_plugins import registry
from dq_plugins.plan import Section
from dq_plugins.plots import lines
from dq_plugins.recipe import Pass, PassOptions, Progress
from dq_plugins.testing.pass_conformance import PassConformance


class Sound(Pass):
    """Leave a section."""

    name = "under-test"
    requires = ("weight-ranges",)
    after = ("a-pass-of-a-package-that-is-not-installed",)

    class Options(PassOptions):
        mark: int = 1

    Options: ClassVar[type[PassOptions]] = Options

    def decide(self, context):
        return {"mark": self.options.mark}

    def run(self, plan, context):
        yield Progress(0, 2)
        plan.sections[self.name] = Section(self.decide(context))
        yield Progress(2, 2)


class WithoutProgress(Sound):
    def run(self, plan, context):
        plan.sections[self.name] = Section(self.decide(context))


class TwoPhases(Sound):
    def run(self, plan, context):
        yield from super().run(plan, context)
        yield Progress(0, 7, "second phase")


class SeededRandom(Sound):
    def decide(self, context):
        return {"draw": float(torch.rand((), generator=context.generator()))}


class Draws(Sound):
    @classmethod
    def figure(cls, plan):
        return lines({"mark": ([0, 1], [0, plan.sections[cls.name].data["mark"]])}, "x", "mark"), "The mark."


class Misnamed(Sound):
    name = "someone-else"


class OptionWithoutDefault(Sound):
    class Options(PassOptions):
        mark: int

    Options: ClassVar[type[PassOptions]] = Options


class AnyOption(Sound):
    def __init__(self, **options):
        super().__init__(mark=options.get("mark", 1))


class RequiresNobody(Sound):
    requires = ("no-such-pass",)


class Speechless(Sound):
    def decide(self, context):
        self.layers["last"].weight = self.layers["last"].unquantized_reason = None
        return {}

    def run(self, plan, context):
        self.layers = plan.layers
        yield from super().run(plan, context)


class Idle(Sound):
    def run(self, plan, context):
        yield Progress(1, 1)


class GlobalRandom(Sound):
    def decide(self, context):
        return {"draw": float(torch.rand(()))}


class Remembers(Sound):
    calls = count()

    def decide(self, context):
        return {"calls": next(self.calls)}


class LeavesAHook(Sound):
    def decide(self, context):
        context.denoiser.last.register_forward_hook(lambda *_: None)
        return {}


class ReplacesALayer(Sound):
    def decide(self, context):
        context.denoiser.last = torch.nn.Sequential(context.denoiser.last)
        return {}


class GoesBack(Sound):
    def run(self, plan, context):
        yield from super().run(plan, context)
        yield Progress(1, 2)


class Overshoots(Sound):
    def run(self, plan, context):
        yield from super().run(plan, context)
        yield Progress(3, 2)


class YieldsNumbers(Sound):
    def run(self, plan, context):
        for step in super().run(plan, context):
            yield type("Half", (), {"done": step.done, "total": step.total, "what": ""})()


class WithoutCaption(Draws):
    @classmethod
    def figure(cls, plan):
        return super().figure(plan)[0], ""


FAULTS = {
    Misnamed: "it is a pass class under its registered name",
    OptionWithoutDefault: "options have defaults",
    AnyOption: "unknown option is refused",
    RequiresNobody: "passes it requires exist",
    Speechless: "plan is valid and survives a round trip",
    Idle: "it decides something",
    GlobalRandom: "same seed same plan",
    Remembers: "same seed same plan",
    LeavesAHook: "denoiser is left as it was",
    ReplacesALayer: "denoiser is left as it was",
    WithoutCaption: "figure is drawn from the plan",
    GoesBack: "progress goes forward",
    Overshoots: "progress goes forward",
    YieldsNumbers: "progress goes forward",
}


@pytest.mark.parametrize(
    "sound", [Sound, WithoutProgress, TwoPhases, SeededRandom, Draws], ids=lambda sound: sound.__name__
)
def test_a_sound_pass_passes(failures, sound):
    sound.__doc__ = "Leave a section."
    assert failures(PassConformance, sound) == set()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_caught_by_the_test_that_is_named_after_it(failures, fault):
    assert FAULTS[fault] in failures(PassConformance, fault)


def test_object_that_is_no_pass_class_is_caught(failures):
    found = failures(PassConformance, Sound())
    assert "it is a pass class under its registered name" in found


def test_every_check_has_a_fault_that_it_catches():
    own = {name.removeprefix("test_").replace("_", " ") for name in vars(PassConformance) if "test_" in name}
    assert own == set(FAULTS.values())


def test_passes_that_it_requires_run_before_it_once():
    class Second(Sound):
        name = "second"
        requires = ("under-test", "weight-ranges")

    class Suite(PassConformance):
        name = "second"
        options: ClassVar = {"mark": 2}
        before: ClassVar = {"weight-ranges": {"method": "minmax"}}

    with registry.temporary("pass", "under-test", Sound), registry.temporary("pass", "second", Second):
        steps = Suite().steps()
    assert [(step.name, dict(step.options)) for step in steps] == [
        ("weight-ranges", {"method": "minmax"}),
        ("under-test", {}),
        ("second", {"mark": 2}),
    ]
