from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import dq_brevitas
import pytest

from dq_plugins.errors import DQError

FOLDER = Path(dq_brevitas.__file__).parent


def run(code: str) -> str:
    command = [sys.executable, "-W", "always", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_every_name_is_there_and_none_is_hidden_by_a_module_of_the_same_name():
    modules = {path.stem for path in FOLDER.rglob("*.py")}
    for name in dq_brevitas.__all__:
        assert callable(getattr(dq_brevitas, name)), name
        assert name not in modules, f"importing dq_brevitas.{name} would replace the public {name}"


def test_importing_the_package_loads_no_framework():
    assert run("import dq_brevitas, sys; print([m for m in ('brevitas', 'onnx') if m in sys.modules])") == "[]\n"


def test_without_brevitas_the_error_holds_the_pip_line():
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "import dq_plugins.errors as e; e.find_spec = lambda n: None if n == 'brevitas' else find(n)\n"
        "import dq_brevitas"
    )
    assert "MissingDependencyError" in run(code)
    assert "pip install 'dq-plugins[brevitas]'" in run(code)


def test_quantizers_load_quietly_and_without_onnx():
    assert run("import sys, dq_brevitas.quantizers; print('onnx' in sys.modules)") == "False\n"


def test_jit_is_refused(monkeypatch):
    import brevitas.config
    from dq_brevitas import host

    monkeypatch.setattr(brevitas.config, "JIT_ENABLED", True)
    with pytest.raises(DQError, match="Unset BREVITAS_JIT"):
        importlib.reload(host)
