import copy

import pytest
import torch
from denoisers import TinyDenoiser, recorded, tiny_denoiser

import dq_plugins as dq


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    return denoiser, recorded(denoiser, tmp_path_factory.mktemp("calib"), batch=4)


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (3, 8), (3, None)])
def test_best_keeps_nothing_that_is_worse_on_what_it_held_out(case, bits) -> None:
    denoiser, calibration = case
    plan = dq.make_plan(denoiser, calibration, "best", weight_bits=bits[0], act_bits=bits[1], progress=False)
    blocks = plan.sections["block-reconstruction"].data["blocks"]
    verdicts = [*blocks.values(), plan.sections["learned-ranges"].data["losses"]["denoiser"]]
    assert all(each["kept_start"] or each["learned"] < each["start"] for each in verdicts)
    assert bool(blocks) == (bits[0] == 3)  # behind GPTQ that of wider weights stays
    model = dq.apply(copy.deepcopy(denoiser), plan, backend="simulate")
    with torch.no_grad():
        assert all(bool(torch.isfinite(call.run(model)).all()) for call in calibration.calls())


def test_low_bit_is_best_with_room_for_more_directions() -> None:
    best, low_bit = (dq.get("recipe", name) for name in ("best", "low-bit"))
    other = [step.name for step, more in zip(best.steps, low_bit.steps, strict=True) if step != more]
    assert other == ["low-rank"]
    assert low_bit.targets == best.targets


@pytest.mark.parametrize(("recipe", "bits"), [("low-bit", 4), ("best", 8)])
def test_directions_stay_in_floating_point_and_the_rest_runs_in_integers(tmp_path_factory, recipe, bits) -> None:
    torch.manual_seed(3)
    denoiser = TinyDenoiser(width=32).eval().requires_grad_(False)
    calibration = recorded(denoiser, tmp_path_factory.mktemp("wide"), batch=4)
    # with one rank, and room in every layer, all that 8 bits may pay for would go to the first one
    quick = {"block-reconstruction": {"iterations": 4}, "learned-ranges": {"passes": 0.5}}
    quick |= {
        "low-rank": {"ranks": (4,), "most": 0.25},
        "group-widths": {"seconds": 0.3, "probes": 2, "runs": 1},
    }
    given = {"weight_bits": bits, "act_bits": bits, "options": quick, "progress": False}
    plan = dq.make_plan(denoiser, calibration, recipe, **given)
    assert "subspace" in plan.features
    model = dq.apply(copy.deepcopy(denoiser), plan, backend="torchao")
    with torch.no_grad():
        assert all(bool(torch.isfinite(call.run(model)).all()) for call in calibration.calls())


@pytest.mark.parametrize("act_bits", [8, 5, None])
def test_mixed_precision_keeps_the_mean_and_runs_in_integers(tmp_path_factory, act_bits: int | None) -> None:
    torch.manual_seed(3)
    denoiser = TinyDenoiser(width=32).eval().requires_grad_(False)
    calibration = recorded(denoiser, tmp_path_factory.mktemp("wide"), batch=4)
    quick = {
        "sensitivity": {"draws": 8, "check_entries": 2, "image_probes": 1},
        "low-rank": {"ranks": (4,)},
        "group-widths": {"seconds": 0.3, "probes": 2, "runs": 1},
    }
    given = {"weight_bits": 4, "act_bits": act_bits, "options": quick, "progress": False}
    plan = dq.make_plan(denoiser, calibration, "mixed-precision", **given)
    found = plan.sections["bit-allocation"].data
    assert found["status"] == "optimal"
    assert 3 < found["mean_weight_bits"] <= 4  # what the budget has is spent
    assert len({layer.weight.bits for layer in plan.layers.values() if layer.weight}) > 1
    assert plan.sensitivity.act_choices == (act_bits or 8,)
    assert ("group-widths" in plan.sections) is (act_bits == 5)
    model = dq.apply(copy.deepcopy(denoiser), plan, backend="torchao")
    with torch.no_grad():
        assert all(bool(torch.isfinite(call.run(model)).all()) for call in calibration.calls())
