"""The wheel holds everything that the demo and the adapters need."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return set(wheel.namelist())


@pytest.mark.parametrize("package", ["dq_plugins", "dq_torchao", "dq_brevitas", "dq_diffusers"])
def test_holds_every_package_as_an_import_package_of_its_own(names: set[str], package: str) -> None:
    assert f"{package}/__init__.py" in names
    assert not any(name.startswith(("adapters/", "tests/", "benchmarks/")) for name in names)


@pytest.mark.parametrize("denoiser", ["emoji", "digits"])
def test_holds_the_bundled_denoisers(names: set[str], denoiser: str) -> None:
    inside = {name for name in names if name.startswith(f"dq_plugins/denoisers/{denoiser}/")}
    assert f"dq_plugins/denoisers/{denoiser}/model_index.json" in inside
    assert any(name.endswith(".safetensors") for name in inside)


def test_bundled_denoisers_are_small() -> None:
    files = [f for n in ("emoji", "digits") for f in (ROOT / "examples" / "denoisers" / n).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 10e6
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
