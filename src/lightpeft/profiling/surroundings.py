"""Hardware and software versions of a measurement."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
from functools import cache
from pathlib import Path

import psutil
import torch

from lightpeft.machine import has_bf16

UNKNOWN = "0+unknown"
"""The version of a package that is not installed."""
WORKS_WITH = ("deepspeed", "flash-attn", "numpy", "sentence-transformers", "tokenizers", "trl")
"""Packages that no requirement of lightpeft names, and on which its results may depend."""
NAME = re.compile(r"[A-Za-z0-9._-]+")


def hardware() -> dict[str, str | int | None]:
    """Return hardware and software versions of this process as plain data for a report."""
    return {
        "cpu": _cpu_name(),
        "logical_cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_bf16": has_bf16(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        **versions(),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of lightpeft and of the libraries that its results depend on."""
    return {name: version_of(name) for name in ("torch", "transformers", "peft", "lightpeft")}


def installed() -> dict[str, str]:
    """Versions of all installed packages that lightpeft asks for, extras included, and of those that it works with."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        asked = [NAME.match(each) for each in importlib.metadata.requires("lightpeft") or ()]
        names = {found.group().lower() for found in asked if found} | set(WORKS_WITH)
        found = {name: version_of(name) for name in sorted(names)}
        return {name: version for name, version in found.items() if version != UNKNOWN}
    return {}


@cache
def version_of(package: str) -> str:
    """Return the version of an installed package; "0+unknown" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN
