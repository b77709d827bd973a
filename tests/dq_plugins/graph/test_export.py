from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from odd_denoisers import TwoLayers
from torch import Tensor

from dq_plugins.errors import TraceError
from dq_plugins.graph import export
from dq_plugins.graph.export import export_denoiser


class AsksTheDevice(TwoLayers):
    def forward(self, x, t):
        with torch.autocast(x.device.type, enabled=False):  # the meta device has no autocast
            e = self.time(t.float())
        return self.body(x) + e


class ComputesInNumpy(TwoLayers):
    def forward(self, x, t):
        return self.body(x) + self.time(torch.from_numpy(np.cos(t.numpy())))


class BranchesOnValues(TwoLayers):
    def forward(self, x, t):
        return self.body(x) if t.mean() > 0.5 else self.time(x)


class ReturnsNothing(TwoLayers):
    def forward(self, x, t):
        self.body(x)


@dataclass
class Output:
    sample: Tensor
    extra: list[Tensor]


class ReturnsADataclass(TwoLayers):
    def forward(self, x, t):
        return Output(self.body(x), [self.time(t)])


def attempts(monkeypatch, model) -> list[tuple[str, bool]]:
    taken, original = [], export._export

    def spy(denoiser, inputs, *way):
        taken.append(way)
        return original(denoiser, inputs, *way)

    monkeypatch.setattr(export, "_export", spy)
    export_denoiser(model, TwoLayers.inputs())
    return taken


@pytest.mark.parametrize(("model", "needed"), [(TwoLayers, 1), (AsksTheDevice, 2), (ComputesInNumpy, 3)])
def test_each_style_of_code_is_traced_by_the_first_way_that_can(monkeypatch, model, needed):
    assert len(attempts(monkeypatch, model())) == needed


def test_outputs_of_any_nesting_are_flattened():
    program, names = export_denoiser(ReturnsADataclass(), TwoLayers.inputs())
    assert names == ("x", "t")
    assert len(program.graph_signature.user_outputs) == 2


def test_a_denoiser_that_branches_on_values_fails_with_every_reason_and_the_way_out():
    with pytest.raises(TraceError, match=r"BranchesOnValues cannot be traced.*on meta tensors:.*strict:.*`\.item\(\)`"):
        export_denoiser(BranchesOnValues(), TwoLayers.inputs())


def test_a_failure_names_the_line_and_prints_nothing(capfd):
    class AsksForANumber(TwoLayers):
        def forward(self, x, t):
            return self.body(x) * torch.as_tensor(float(t.sum())).expand(len(x), 1)

    with pytest.raises(TraceError, match=r"It stopped at .*test_export\.py:\d+, in forward: `return .*float\("):
        export_denoiser(AsksForANumber(), TwoLayers.inputs())
    assert capfd.readouterr().err == ""


def test_an_error_of_the_denoisers_own_code_is_quoted():
    inputs = {"x": torch.zeros(2, 5), "t": torch.zeros(2, 4)}
    with pytest.raises(TraceError, match="RuntimeError: .*5.*Check first that the denoiser runs"):
        export_denoiser(TwoLayers(), inputs)


def test_an_output_without_tensors_is_refused():
    with pytest.raises(TraceError, match=r"^the forward of ReturnsNothing returned NoneType, with no tensor"):
        export_denoiser(ReturnsNothing(), TwoLayers.inputs())
