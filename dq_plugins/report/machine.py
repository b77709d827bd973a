"""What a run was made on: the machine and the versions, as a reader of its figures wants to know them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dq_plugins.version import __version__

_PACKAGES = ("torch", "torchao", "diffusers", "brevitas")


def machine_facts() -> dict[str, str]:
    """Processor, threads and versions, by name."""
    return {
        "processor": _processor(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "versions": _versions(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = names[0] if names else platform.processor() or platform.machine()
    return f"{found}, {torch.backends.cpu.get_cpu_capability()}"


def _versions() -> str:
    found = [f"dq-plugins {__version__}", f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
