"""This process and its machine, as the operating system tells it: memory used, processor name."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_CPUINFO = Path("/proc/cpuinfo")


def _field(text: str, name: str) -> str | None:
    """The value of the first `name : value` line."""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return None


def peak_rss_bytes() -> int:
    """The most resident memory this process has had so far.

    Linux's ru_maxrss starts at the peak of the process that started this one, so a small child of a
    large parent would report the parent; the status file counts this program alone.
    """
    if _STATUS.exists() and (value := _field(_STATUS.read_text(), "VmHWM")) is not None:
        return int(value.split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def rss_bytes() -> int:
    """The resident memory this process has now."""
    return int(psutil.Process().memory_info().rss)


def cpu_name() -> str:
    """The processor's name for a report ("AMD EPYC 7B13"); the machine type if unknown."""
    name: str | None = None
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    elif _CPUINFO.exists():
        name = _field(_CPUINFO.read_text(), "model name")
    return name or platform.processor() or platform.machine()
