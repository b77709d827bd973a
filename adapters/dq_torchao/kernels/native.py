"""C++ of ours, compiled at first use with the compiler that inductor takes, and kept for later processes.

The library has a C interface and includes no header of PyTorch: compiling takes seconds, and it is as good for every
Python. It is kept under the hash of all that it is made from, in the folder of PyTorch's own extensions
(``TORCH_EXTENSIONS_DIR``, or ``~/.cache/torch_extensions``), so an installation without a compiler can be given one.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from dq_plugins.atomic import replacing
from dq_plugins.errors import DQError

NAMES = ("attention", "codes", "dynamic_codes", "gelu", "norm", "product")
SOURCES = tuple(Path(__file__).with_name(f"{name}.cpp") for name in NAMES)
SHARED = ("avx512", "pointwise", "product", "ranges", "statistics")
HEADERS = tuple(Path(__file__).with_name(f"{name}.h") for name in SHARED)
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-mfma", "-ffp-contract=off")
FLAGS += tuple(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni"))
LIBRARIES = ("-ltorch_cpu", "-lc10")
COMPILERS = ("g++", "clang++", "c++")
PATIENCE_S = 300
"""Seconds that another process, or the compiler, may take."""


class NotBuiltError(DQError):
    """There is no library; the message says why."""


def folder() -> Path:
    """Where libraries are kept."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) / "dq_torchao" if given else Path.home() / ".cache" / "torch_extensions" / "dq_torchao"


def path() -> Path:
    """The file of this release, this PyTorch and this processor architecture, built or not."""
    sources = [source.read_text(encoding="utf-8") for source in (*SOURCES, *HEADERS)]
    parts = (*sources, " ".join(FLAGS), torch.__version__, platform.machine())
    return folder() / f"kernels-{sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


@cache
def library() -> ctypes.CDLL:
    """The library, built if it is not there yet; one process builds, others wait.

    Raises:
        NotBuiltError: there is no compiler, it fails, or the result cannot be loaded.
    """
    if platform.system() != "Linux":
        raise NotBuiltError(f"our C++ kernels are built on Linux only, this is {platform.system()}")
    target = path()
    try:
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with FileLock(target.with_suffix(".lock"), timeout=PATIENCE_S):
                if not target.is_file():
                    _build(target)
        return _declared(ctypes.CDLL(str(target)))
    except Timeout:
        raise NotBuiltError(f"another process has been building {target} for {PATIENCE_S} s") from None
    except OSError as error:
        raise NotBuiltError(f"{target} cannot be written or loaded: {error}") from error


def address(x: torch.Tensor | None) -> int:
    """Where the values of a tensor lie, as a kernel takes it; 0: there is none."""
    return 0 if x is None else x.data_ptr()


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    pointer, long, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    found.dq_codes.argtypes = [pointer, pointer, long, long, pointer, whole, pointer, whole, whole, whole]
    found.dq_codes.restype = None
    found.dq_dynamic_codes.argtypes = [pointer]
    found.dq_gelu.argtypes = [pointer, pointer, long, whole, whole]
    found.dq_gelu.restype = None
    found.dq_row_statistics.argtypes = [pointer, long, long, ctypes.c_float, pointer, pointer, whole]
    found.dq_row_statistics.restype = None
    found.dq_group_statistics.argtypes = [pointer, *[long] * 4, ctypes.c_float, pointer, pointer, whole]
    found.dq_attention.argtypes = [pointer]
    found.dq_product.argtypes = [pointer]
    return found


@cache
def why_not() -> str:
    """Why nothing of ours runs on this processor; empty when it does."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.cpu._is_vnni_supported():
        return "our C++ kernels need an x86 processor with AVX512-VNNI"
    try:
        library()
    except NotBuiltError as error:
        return str(error)
    return ""


def _build(target: Path) -> None:
    command = [*_compiler(), *FLAGS, *map(str, SOURCES)]
    where = Path(torch.__file__).parent / "lib"
    with replacing(target) as temporary:
        command += ["-o", str(temporary), f"-L{where}", *LIBRARIES]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotBuiltError(f"{command[0]} does not run: {error}") from error
        if done.returncode:
            raise NotBuiltError(f"{command[0]} cannot compile our C++ kernels: {done.stderr.strip()[-300:]}")


def _compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    found = chosen or [name for name in COMPILERS if shutil.which(name)][:1]
    if not found or shutil.which(found[0]) is None:
        raise NotBuiltError("our C++ kernels need a compiler: install g++ or clang++, or name one in CXX")
    return found
