"""The terrain denoiser's rebuilt network, its sampler, and how its weights are read out of an ONNX file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from benchmarks.terrain import TerrainSampler, TerrainUNet, denoised, noise_levels
from benchmarks.terrain_weights import terrain_weights
from dq_plugins.errors import DQError


class Copies(nn.Module):
    """Stands for the network; its output depends on every argument."""

    def forward(self, sample: Tensor, timestep: Tensor, difficulty: Tensor) -> Tensor:
        return sample * 0.1 + (timestep / 1e3 - difficulty)[:, None, None, None]


def test_the_network_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = TerrainUNet()
    assert sum(p.numel() for p in network.parameters()) == 10_456_545


def test_images_do_not_depend_on_the_batch_and_difficulties_differ() -> None:
    def drawn(sampler: TerrainSampler) -> np.ndarray:
        return np.concatenate([each.images for each in sampler(Copies())])

    four, two = drawn(TerrainSampler(4, 7)), drawn(TerrainSampler(4, 7, batch=2))
    np.testing.assert_allclose(four, two, atol=1e-6)
    np.testing.assert_allclose(four[1:], drawn(TerrainSampler(3, 8)), atol=1e-6)
    assert four.shape == (4, 128, 128, 1)
    assert four.min() >= 0
    assert four.max() <= 1
    assert len({round(float(image.mean()), 3) for image in four}) == 4


def test_the_consistency_function_is_the_identity_at_the_least_noise() -> None:
    noisy = torch.rand(2, 1, 4, 4) - 0.5
    torch.testing.assert_close(denoised(Copies(), noisy, 0.002, torch.zeros(2)), noisy)


def test_noise_levels_fall() -> None:
    levels = noise_levels(8)
    assert levels[0] == pytest.approx(80)
    assert levels[-1] == pytest.approx(6)
    assert bool((levels.diff() < 0).all())


def _exported(path: Path) -> dict[str, np.ndarray]:
    """Writes what an exporter makes of a group norm and a layer after it."""
    values = {
        "network.layer.weight": np.arange(8, dtype=np.float32).reshape(2, 4),
        "ones": np.ones(2, np.float32),
        "zeros": np.zeros(2, np.float32),
        "shape": np.array([1, 4, 1, 1]),
        "val_1": np.array([2, 3, 4, 5], np.float32).reshape(4, 1, 1),
        "val_2": np.array([6, 7, 8, 9], np.float32).reshape(4, 1, 1),
    }
    nodes = [
        helper.make_node("InstanceNormalization", ["x", "ones", "zeros"], ["a"]),
        helper.make_node("Reshape", ["a", "shape"], ["b"]),
        helper.make_node("Mul", ["b", "val_1"], ["c"]),
        helper.make_node("Add", ["val_2", "c"], ["y"]),
    ]
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    constants = [numpy_helper.from_array(value, name) for name, value in values.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", edges[:1], edges[1:], constants)), path)
    return values


def test_group_norms_without_names_are_found_by_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = _exported(tmp_path / "model.onnx")
    monkeypatch.setenv("DQ_TERRAIN_WEIGHTS", str(tmp_path / "model.onnx"))
    found = terrain_weights(["norm."])
    assert sorted(found) == ["layer.weight", "norm.bias", "norm.weight"]
    np.testing.assert_array_equal(found["layer.weight"], values["network.layer.weight"])
    assert found["norm.weight"].tolist() == [2, 3, 4, 5]
    assert found["norm.bias"].tolist() == [6, 7, 8, 9]
    with pytest.raises(DQError, match="1 group norms, the network 2"):
        terrain_weights(["norm.", "other."])


def test_another_kind_of_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DQ_TERRAIN_WEIGHTS", str(tmp_path / "weights.bin"))
    with pytest.raises(DQError, match=r"takes a \.whl"):
        terrain_weights([])
