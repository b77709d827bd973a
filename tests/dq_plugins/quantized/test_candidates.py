from __future__ import annotations

import pytest
import torch
from sensitivities import tiny_setting

from dq_plugins.quantized.candidates import Candidates, Entry, quantized


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory):
    return tiny_setting(tmp_path_factory.mktemp("setting"))


def test_entries_cover_every_layer_side_and_width(setting):
    denoiser, _, candidates = setting
    layers = [n for n, m in denoiser.named_modules() if hasattr(m, "weight")]
    assert len(candidates.entries()) == len(layers) * 2 * 4
    assert candidates.entries()[:2] == [Entry(layers[0], "weight", 2), Entry(layers[0], "weight", 3)]
    assert str(candidates.entries()[0]) == f"{layers[0]}.weight@2"


def test_quantized_weight_and_input_are_those_of_the_quantizers_and_restored(setting):
    denoiser, calibration, candidates = setting
    call = next(calibration.calls())
    before = denoiser.enter.weight
    seen = []
    with quantized(denoiser, candidates, [Entry("enter", "weight", 2), Entry("enter", "activation", 3)]) as timestep:
        timestep.value = call.timestep
        handle = denoiser.enter.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        changed = call.run(denoiser)
        handle.remove()
        assert torch.equal(denoiser.enter.weight, candidates.weights["enter"][2].fake_quantize(before))
    group = candidates.groups["all"].of(float(call.timestep.reshape(-1)[0]))
    assert torch.equal(seen[0], candidates.activations["enter"][3].fake_quantize(call.kwargs["sample"], group))
    assert denoiser.enter.weight is before
    assert torch.equal(call.run(denoiser), call.output)
    assert not torch.equal(changed, call.output)


def test_denoiser_is_restored_when_the_body_fails(setting):
    denoiser, _, candidates = setting
    before = denoiser.enter.weight
    with (
        pytest.raises(KeyError),
        quantized(denoiser, candidates, [Entry("enter", "weight", 2), Entry("enter", "weight", 7)]),
    ):
        pass
    assert denoiser.enter.weight is before


def test_hash_changes_with_any_quantizer(setting):
    _, _, candidates = setting
    other = dict(candidates.weights)
    other["enter"] = {**other["enter"], 2: other["enter"][3]}
    assert Candidates(other, candidates.activations, candidates.groups).hash != candidates.hash
    assert candidates.subset(candidates.entries()).hash == candidates.hash


def test_subset_keeps_only_what_is_asked_for(setting):
    _, _, candidates = setting
    entry = Entry("leave", "activation", 4)
    small = candidates.subset([entry])
    assert small.entries() == [entry]
    assert small.layers == ("leave",)
