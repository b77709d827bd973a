"""Conformance of adapters: ``apply(model, plan, **options) -> nn.Module`` lowers a plan into a framework.

An adapter may instead lend what its framework knows about denoisers: ``build_from_config(path)`` and
``example_inputs(model)``. What concerns plans is skipped for such a one.
"""

from __future__ import annotations

import copy
import unittest
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dq_plugins.errors import PlanError
from dq_plugins.hashing import weights_hash
from dq_plugins.metrics import sqnr
from dq_plugins.plan import LayerPlan, QuantPlan, Reason, Section
from dq_plugins.quantized.simulate import SimulateAdapter
from dq_plugins.registry import Kind
from dq_plugins.testing.conformance import Conformance, expect, refused
from dq_plugins.testing.denoiser import TIMESTEPS, TinyDenoiser, example_inputs
from dq_plugins.testing.plans import handmade_plan
from dq_plugins.timesteps import TimestepGroups


class AdapterConformance(Conformance):
    """An adapter computes what the plan says, routes by the value of t, and refuses what it cannot do.

    Attributes:
        full_precision_db: least SQNR to the full-precision denoiser at 8 bits.
        simulated_db: least SQNR to plain fake quantization of the same plan.
    """

    kind: ClassVar[Kind] = "adapter"
    full_precision_db: ClassVar[float] = 25.0
    simulated_db: ClassVar[float] = 35.0

    def denoiser(self) -> nn.Module:
        """A full-precision denoiser, the same at every call."""
        return TinyDenoiser()

    def adapter(self) -> Any:
        """The adapter; a class is made without arguments, as `dq_plugins.apply` does."""
        return self.plugin() if isinstance(self.plugin, type) else self.plugin

    def apply(self, plan: QuantPlan, model: nn.Module | None = None, **options: Any) -> nn.Module:
        """Lower ``plan`` onto ``model`` with this suite's options."""
        adapter = self.adapter()
        if not hasattr(adapter, "apply"):
            raise unittest.SkipTest(f"the adapter {self.name!r} lowers no plans")
        return adapter.apply(self.denoiser() if model is None else model, plan, **{**self.options, **options})

    @torch.no_grad()
    def run(self, model: nn.Module, timestep: Tensor | float, batch: int = 2) -> Tensor:
        """Output of ``model`` for fixed inputs at ``timestep``."""
        return model(**{**example_inputs(batch), "timestep": torch.as_tensor(timestep)})

    def test_it_goes_by_its_registered_name(self) -> None:
        found = getattr(self.plugin, "name", None)
        expect(found == self.name, f"the adapter registered as {self.name!r} has the name {found!r}")

    def test_it_does_what_an_adapter_does(self) -> None:
        roles = (("apply",), ("build_from_config", "example_inputs"))
        adapter = self.adapter()
        able = any(all(callable(getattr(adapter, each, None)) for each in role) for role in roles)
        expect(able, f"the adapter {self.name!r} has neither apply nor build_from_config and example_inputs")

    def test_output_is_close_to_full_precision(self) -> None:
        reference, model = self.denoiser(), self.apply(handmade_plan(self.denoiser()))
        for t in TIMESTEPS:
            found = sqnr(self.run(reference, t), self.run(model, t))
            expect(found >= self.full_precision_db, f"{found:.1f} dB at t={t}; expected {self.full_precision_db}")
            expect(found < 100, f"{found:.1f} dB at t={t}: nothing was quantized")

    def test_output_agrees_with_simulation_in_every_group(self) -> None:
        """The plan has one meaning; ranges that differ from group to group show a wrong route."""
        plan = handmade_plan(self.denoiser(), bits=8)
        model, simulated = self.apply(plan), SimulateAdapter().apply(self.denoiser(), plan)
        for t in TIMESTEPS:
            found = sqnr(self.run(simulated, t), self.run(model, t))
            expect(found >= self.simulated_db, f"{found:.1f} dB to simulation at t={t}; expected {self.simulated_db}")

    def test_order_of_timesteps_does_not_matter(self) -> None:
        """Routed by the value of t: shuffled, repeated and skipped steps give the same outputs."""
        model = self.apply(handmade_plan(self.denoiser()))
        first = {t: self.run(model, t) for t in TIMESTEPS}
        for t in (*reversed(TIMESTEPS[1:]), TIMESTEPS[2]):
            expect(torch.equal(first[t], self.run(model, t)), f"t={t} gave another output when called in another order")

    def test_every_sample_may_have_its_own_timestep(self) -> None:
        model = self.apply(handmade_plan(self.denoiser()))
        both = self.run(model, torch.tensor([TIMESTEPS[0], TIMESTEPS[-1]]))
        for row, t in ((0, TIMESTEPS[0]), (1, TIMESTEPS[-1])):
            found = sqnr(self.run(model, t)[row], both[row])
            expect(found > 60, f"sample {row} of a batch of two timesteps is {found:.1f} dB from its own call at t={t}")

    def test_same_plan_same_output(self) -> None:
        plan = handmade_plan(self.denoiser())
        outputs = [self.run(self.apply(plan), TIMESTEPS[0]) for _ in range(2)]
        expect(torch.equal(*outputs), "the same plan applied to the same weights twice gave two outputs")

    def test_plan_is_left_as_it_is(self) -> None:
        plan = handmade_plan(self.denoiser())
        before = plan.hash
        self.run(self.apply(plan), TIMESTEPS[0])
        expect(plan.hash == before, "applying the plan changed it")

    def test_copy_is_independent(self) -> None:
        model = self.apply(handmade_plan(self.denoiser()))
        expected = self.run(model, TIMESTEPS[0])
        copied = copy.deepcopy(model)
        del model
        expect(torch.equal(expected, self.run(copied, TIMESTEPS[0])), "a deep copy gives another output")

    def test_layer_in_full_precision_stays_so(self) -> None:
        reference, plan = self.denoiser(), handmade_plan(self.denoiser())
        for name, layer in plan.layers.items():
            plan.layers[name] = LayerPlan(layer.kind, unquantized_reason=Reason("this test keeps it"))
        found = self.run(self.apply(plan), TIMESTEPS[0])
        expected = self.run(reference, TIMESTEPS[0])
        expect(torch.equal(found, expected), "a plan that quantizes nothing changed the output")

    def test_timestep_outside_the_calibrated_range_is_refused(self) -> None:
        groups = TimestepGroups((500.0,), low=100.0, high=900.0)
        model = self.apply(handmade_plan(self.denoiser(), groups=groups))
        with refused("t=999, outside the calibrated [100, 900],"):
            self.run(model, 999)

    def test_plan_of_other_weights_is_refused_before_anything_changes(self) -> None:
        plan, other = handmade_plan(self.denoiser()), TinyDenoiser(seed=1)
        before = weights_hash(other)
        with refused("a plan of other weights", PlanError):
            self.apply(plan, other)
        expect(weights_hash(other) == before, "the model was changed although its plan was refused")

    def test_unknown_layer_is_refused(self) -> None:
        plan = handmade_plan(self.denoiser())
        plan.layers["no.such.layer"] = LayerPlan("linear")
        with refused("a plan with an unknown layer", PlanError):
            self.apply(plan)

    def test_unknown_critical_section_is_refused(self) -> None:
        """A section that the adapter does not implement and that changes the result."""
        plan = handmade_plan(self.denoiser())
        plan.sections["from-the-future"] = Section(critical=True)
        with refused("a plan with an unknown critical section", PlanError):
            self.apply(plan)

    def test_unknown_option_is_refused(self) -> None:
        with refused("the option 'no_such_option'", Exception):
            self.apply(handmade_plan(self.denoiser()), no_such_option=1)
