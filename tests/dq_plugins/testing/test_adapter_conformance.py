from __future__ import annotations

import copy
import itertools

import pytest
import torch

from dq_plugins import registry
from dq_plugins.quantized.layer import simulate_layer
from dq_plugins.quantized.simulate import SimulateAdapter
from dq_plugins.testing import run_suite, suite_for
from dq_plugins.testing.adapter_conformance import AdapterConformance
from dq_plugins.testing.denoiser import TinyDenoiser
from dq_plugins.timesteps import TimestepContext, attach_context


class Sound(SimulateAdapter):
    """Plain fake quantization."""

    name = "under-test"


class Misnamed(Sound):
    name = "someone-else"


class Mute:
    """Neither lowers plans nor knows denoisers."""

    name = "under-test"


class DoesNothing(Sound):
    def apply(self, model, plan, *, out_of_range="error"):
        plan.check_model(model)
        return model


class FewerBits(Sound):
    def apply(self, model, plan, *, out_of_range="error"):
        plan = copy.deepcopy(plan)
        for layer in plan.layers.values():
            layer.activation.bits = 2
        return super().apply(model, plan, out_of_range=out_of_range)


class LastGroupOnly(Sound):
    def apply(self, model, plan, *, out_of_range="error"):
        plan = copy.deepcopy(plan)
        for layer in plan.layers.values():
            if layer.activation:
                layer.activation.scale[:] = layer.activation.scale[-1].item()
        return super().apply(model, plan, out_of_range=out_of_range)


class CountsCalls(Sound):
    """Walks down the recorded schedule, whatever t it is told."""

    def apply(self, model, plan, *, out_of_range="error"):
        model = super().apply(model, plan, out_of_range=out_of_range)
        inner, schedule = model.forward, itertools.cycle(plan.schedule.timesteps)
        model.forward = lambda sample, timestep, condition: inner(sample, torch.tensor(next(schedule)), condition)
        return model


class FirstTimestepForAll(Sound):
    def apply(self, model, plan, *, out_of_range="error"):
        model = super().apply(model, plan, out_of_range=out_of_range)
        inner = model.forward
        model.forward = lambda sample, timestep, condition: inner(sample, timestep.reshape(-1)[0], condition)
        return model


class Jittery(Sound):
    def apply(self, model, plan, *, out_of_range="error"):
        model = super().apply(model, plan, out_of_range=out_of_range)
        model.last.bias.data += 1e-5 * torch.rand(4)
        return model


class WritesIntoThePlan(Sound):
    def apply(self, model, plan, *, out_of_range="error"):
        plan.groups = {**plan.groups, "extra": plan.groups["all"]}
        return super().apply(model, plan, out_of_range=out_of_range)


class NoCopies(Sound):
    def apply(self, model, plan, *, out_of_range="error"):
        model = super().apply(model, plan, out_of_range=out_of_range)
        model.generator = (each for each in ())
        return model


class RoundsEveryWeight(Sound):
    def apply(self, model, plan, *, out_of_range="error"):
        model = super().apply(model, plan, out_of_range=out_of_range)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        return model


class NearestAlways(Sound):
    def apply(self, model, plan, *, out_of_range="nearest"):
        return super().apply(model, plan, out_of_range=out_of_range)


class ChecksNothing(Sound):
    def apply(self, model, plan, *, out_of_range="error"):
        context = TimestepContext(plan.groups, out_of_range)
        for name, layer in plan.layers.items():
            if name in dict(model.named_modules()):
                simulate_layer(model.get_submodule(name), layer, context)
        attach_context(model, context, plan.timestep_argument)
        return model


class ChecksTooLate(Sound):
    def apply(self, model, plan, *, out_of_range="error"):
        model.last.weight.data *= 2
        plan.check_model(model)
        return super().apply(model, plan, out_of_range=out_of_range)


class AnyOption(Sound):
    def apply(self, model, plan, **options):
        return super().apply(model, plan)


FAULTS = {
    Misnamed: {"it goes by its registered name"},
    Mute: {"it does what an adapter does"},
    DoesNothing: {"output is close to full precision"},
    FewerBits: {"output is close to full precision"},
    LastGroupOnly: {"output agrees with simulation in every group"},
    CountsCalls: {"order of timesteps does not matter"},
    FirstTimestepForAll: {"every sample may have its own timestep"},
    Jittery: {"same plan same output"},
    WritesIntoThePlan: {"plan is left as it is"},
    NoCopies: {"copy is independent"},
    RoundsEveryWeight: {"layer in full precision stays so"},
    NearestAlways: {"timestep outside the calibrated range is refused"},
    ChecksTooLate: {"plan of other weights is refused before anything changes"},
    ChecksNothing: {"unknown critical section is refused", "unknown layer is refused"},
    AnyOption: {"unknown option is refused"},
}


@pytest.mark.parametrize("adapter", [Sound, Sound()], ids=["class", "instance"])
def test_a_sound_adapter_passes_as_a_class_and_as_an_instance(failures, adapter):
    assert failures(AdapterConformance, adapter) == set()


def test_adapter_that_lends_and_does_not_lower_is_not_asked_to_lower():
    class Lender:
        """Knows denoisers."""

        name = "lender"

        def build_from_config(self, path):
            return TinyDenoiser()

        def example_inputs(self, model):
            return {}

    with registry.temporary("adapter", "lender", Lender):
        outcomes = {result.outcome for result in run_suite(suite_for("adapter", "lender"))}
    assert outcomes == {"passed", "skipped"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_caught_by_the_test_that_is_named_after_it(failures, fault):
    assert set(FAULTS[fault]) <= failures(AdapterConformance, fault)


def test_every_check_has_a_fault_that_it_catches():
    own = {name.removeprefix("test_").replace("_", " ") for name in vars(AdapterConformance) if "test_" in name}
    assert own == {each for names in FAULTS.values() for each in names}
