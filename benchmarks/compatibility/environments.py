"""The environments: interpreters and releases, oldest and newest together, and those between."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PINNED = ("torch", "torchao", "diffusers", "transformers", "brevitas")


@dataclass(frozen=True)
class Environment:
    """One row of the table.

    Attributes:
        name: of the row.
        python: ``"3.10"``.
        releases: versions by package; what is not named is the newest that ``pyproject.toml`` and pip allow.
        constraints: whether ``constraints.txt`` holds.
    """

    name: str
    python: str
    releases: tuple[tuple[str, str], ...] = ()
    constraints: bool = False

    @property
    def requirements(self) -> list[str]:
        """What pip is asked for beside the wheel."""
        return [f"{package}=={version}" for package, version in self.releases]


def environments() -> Iterator[Environment]:
    """All of them; a new release of a package is a new row, or takes the place of the newest."""
    oldest = {"torch": "2.11.0", "torchao": "0.16.0", "diffusers": "0.40.0", "transformers": "5.0.0"}
    yield Environment("oldest", "3.10", (*oldest.items(), ("brevitas", "0.13.0")))
    yield Environment("newest on 3.10", "3.10")
    yield Environment("constraints, 3.10", "3.10", constraints=True)
    yield Environment("constraints", "3.11", constraints=True)
    yield Environment("torch 2.12", "3.11", (("torch", "2.12.1"), ("torchao", "0.17.0"), ("diffusers", "0.40.0")))
    yield Environment("newest on 3.12", "3.12")
    yield Environment("newest", "3.13")


def interpreter(version: str) -> str | None:
    """A Python of this version: on the path, of pyenv, or of uv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = sorted(pyenv.glob(f"{version}.*/bin/python"))
    if found:
        return str(found[-1])
    if path := shutil.which(f"python{version}"):
        return path
    if shutil.which("uv") is None:
        return None
    done = subprocess.run(["uv", "python", "find", version], capture_output=True, text=True)
    return done.stdout.strip() or None


def install(environment: Environment, python: str, wheel: Path, folder: Path) -> Path:
    """Make the environment in an empty folder; gives its Python.

    Raises:
        subprocess.CalledProcessError: it does not install; ``stderr`` is pip's.
    """
    subprocess.run([python, "-m", "venv", folder], check=True, capture_output=True)
    own = folder / "bin" / "python"
    wanted = [f"dq-plugins[all,export] @ {wheel.resolve().as_uri()}", *environment.requirements]
    pip = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    constraints = str(ROOT / "constraints.txt") if environment.constraints else os.devnull
    # a cap that the machine sets for its own reasons would leave the newest releases untried
    settings = {**os.environ, "PIP_CONSTRAINT": constraints}
    subprocess.run([*pip, *wanted], check=True, capture_output=True, text=True, env=settings)
    return own
