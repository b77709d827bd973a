"""Scripts in a process of their own, without waiting each time until torch and diffusers are imported.

A server imports what most scripts use and then forks: each script runs in a fork, in its own folder, under the name
``__main__``. It computes on one thread, so that forks find no pool of threads that are not theirs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

SEED = 67280421310721
"""With which torch starts."""


class Done(NamedTuple):
    """How a script ended."""

    returncode: int
    stdout: str
    stderr: str


class WarmPython:
    """Runs scripts in forks of a process that has imported what they need; to be used with ``with``."""

    def __enter__(self) -> WarmPython:
        # a fork has none of the threads that a product in the server would have started, and would wait for them
        one = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=one)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.communicate()

    def run(self, script: Path) -> Done:
        """Run ``script`` in its own folder to its end."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(str(script)) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        return Done(status, *(script.with_suffix(suffix).read_text() for suffix in (".out", ".err")))


def serve() -> None:
    """Fork a process for each script that standard input names, and answer with its status."""
    import dq_brevitas  # noqa: F401
    import dq_diffusers
    import dq_torchao  # noqa: F401
    import ortools.sat.python.cp_model  # noqa: F401
    import torch.export  # noqa: F401

    import dq_plugins

    for name in ("digits", "emoji"):  # the classes of diffusers and transformers are imported by the first use
        dq_diffusers.load_pipeline(dq_plugins.bundled(name))
    for line in sys.stdin:
        script = Path(json.loads(line))
        child = os.fork()
        if child == 0:
            _run(script)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(script: Path) -> NoReturn:
    """Be a Python that was started with ``script``, to the end of the process."""
    import torch

    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(script.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(script.parent)
    torch.manual_seed(SEED)
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__file__ = str(script)
    sys.argv, sys.path[0], status = [str(script)], str(script.parent), 0
    try:
        exec(compile(script.read_text(), script, "exec"), main.__dict__)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
