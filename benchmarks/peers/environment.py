"""An environment for a peer: its own packages over everything that the running interpreter has."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import site
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

KEPT = ("torch", "numpy", "safetensors", "torchao", "brevitas", "diffusers")


def interpreter(name: str, requirements: Sequence[str]) -> Path:
    """The Python of a peer's environment, made where it is missing; the running one where nothing is required.

    The environment sees the site folders of the running interpreter after its own, and pip may not change the packages
    in `KEPT`: a peer cannot bring another PyTorch.

    Raises:
        RuntimeError: its packages do not install beside these; the text is pip's.
    """
    if not requirements:
        return Path(sys.executable)
    pins = [f"{kept}=={importlib.metadata.version(kept)}" for kept in KEPT]
    tag = hashlib.sha256("\n".join([*requirements, *pins, sys.prefix]).encode()).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dq-plugins" / "peers" / f"{name}-{tag}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.is_file():
        venv.create(folder, clear=True, with_pip=False)
        (own,) = (folder / "lib").glob("python*/site-packages")
        found = [path for path in site.getsitepackages() if Path(path).is_dir()]
        (own / "running.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in found))
        command = [str(python), "-m", "pip", "install", "--quiet", *requirements, *pins]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} does not install here: {done.stderr.strip().splitlines()[-1]}")
        ready.write_text("\n".join(requirements))
    return python
