"""The wheel holds everything that the demo and the adapters need."""

import re
import subprocess
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as files:
        return set(files.namelist())


def test_description_on_pypi_has_no_relative_link_and_names_files_that_are_there(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        name = next(name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = BytesParser().parsebytes(files.read(name))
    assert metadata["Description-Content-Type"] == "text/markdown"
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", metadata.get_payload())
    prefix = re.compile(rf"https://github.com/dq-plugins/dq-plugins/(blob|raw)/v{re.escape(metadata['Version'])}/")
    assert len(targets) > 20
    assert all(target.startswith("https://") for target in targets)
    inside = [prefix.sub("", target) for target in targets if prefix.match(target)]
    assert len(inside) > 20
    assert not [path for path in inside if not (ROOT / path).exists()]


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
