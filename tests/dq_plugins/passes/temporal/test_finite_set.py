import torch
from denoisers import SCHEDULE, class_denoiser, recorded_classes

from dq_plugins.passes.temporal.block import temporal_block
from dq_plugins.passes.temporal.finite_set import finite_set, recorded_conditions


def wide_block(denoiser: torch.nn.Module):
    inputs = {"sample": torch.zeros(1, 2, 8, 8), "timestep": torch.tensor([5.0]), "label": torch.tensor([0])}
    return temporal_block(denoiser, inputs, with_conditions=True)


def test_takes_in_what_mixes_t_with_a_class() -> None:
    block = wide_block(class_denoiser())
    assert block.layers == {"p", "q", "body.0.beta", "body.1.beta"}
    assert set(block.tables.values()) == {"body.0.beta", "body.1.beta"}
    assert block.conditions == ("label",)


def test_one_point_for_each_timestep_and_recorded_condition(tmp_path) -> None:
    denoiser = class_denoiser()
    block, calibration = wide_block(denoiser), recorded_classes(denoiser, tmp_path)
    conditions = recorded_conditions(calibration, block.conditions, 32)
    assert [c["label"].tolist() for c in conditions] == [[0], [2], [1]]
    assert len(recorded_conditions(calibration, block.conditions, 2)) == 2
    points = finite_set(block, SCHEDULE, conditions)
    assert len(points) == 3 * len(SCHEDULE)
    features = block.features(points.inputs)
    seen = {}
    for name in block.tables.values():
        denoiser.get_submodule(name).register_forward_hook(lambda _m, _i, out, n=name: seen.__setitem__(n, out))
    for point in range(len(points)):
        inputs = points.rows(torch.tensor([point]))
        denoiser(torch.randn(1, 2, 8, 8), inputs["timestep"][0], inputs["label"][0])
        for node, name in block.tables.items():
            torch.testing.assert_close(features[node][point], seen[name])


def test_a_row_holds_what_happens_at_one_timestep(tmp_path) -> None:
    denoiser = class_denoiser()
    block = wide_block(denoiser)
    points = finite_set(block, SCHEDULE, [{"label": torch.tensor([c])} for c in range(3)])
    rows = points.by_timestep(points.inputs["timestep"])
    assert rows.tolist() == [[t] * 3 for t in SCHEDULE]
