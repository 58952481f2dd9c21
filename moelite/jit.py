"""Compiling kernels with numba, and keeping the machine code where a change of source misses it.

The target is the host's, unless numba was told to compile for another CPU (NUMBA_CPU_NAME,
NUMBA_CPU_FEATURES): then it follows those, which is how tests force the other lowerings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite import binding
from numba.core import config
from platformdirs import user_cache_path

_settings: Any = config  # its attributes are made at run time, unseen by type checkers


def target_features() -> tuple[str, str]:
    """(cpu name, comma-separated LLVM features) that numba compiles for."""
    name = _settings.CPU_NAME or binding.get_host_cpu_name()
    if _settings.CPU_FEATURES is not None:
        return name, _settings.CPU_FEATURES
    return name, binding.get_host_cpu_features().flatten() if _settings.CPU_NAME is None else ""


def _choose_target() -> str:
    features = _FEATURES
    if _ARM:
        return "neon" if "+dotprod" in features or _NAME.startswith("apple-") else "plain"
    if {"+avx512vnni", "+avx512vl", "+avx512vbmi"} <= features:
        return "vbmi"
    if "+avxvnni" in features or {"+avx512vnni", "+avx512vl"} <= features:
        return "vnni"
    return "avx2" if {"+avx2", "+fma"} <= features else "plain"


_NAME, _LIST = target_features()
_FEATURES = set(_LIST.split(","))
_ARM = binding.get_process_triple().startswith(("aarch64", "arm64"))
TARGET = _choose_target()
VNNI = TARGET in ("vbmi", "vnni")
HALF_INSTRUCTIONS = _ARM or "+f16c" in _FEATURES
CARRYLESS = not _ARM and "+pclmul" in _FEATURES  # multiplication without carries
WIDE = {"+avx512vnni", "+avx512vl"} <= _FEATURES  # 512-bit vectors, for many tokens at once


def kernel_sources() -> list[Path]:
    """Every file whose code, or table, can end up inside a compiled kernel."""
    package = Path(__file__).resolve().parent
    folder = package.parent / "quant"
    if not (folder / "base.py").exists():
        folder = package / "quant"
    formats = sorted(folder.glob("*.py")) + sorted(folder.glob("*.npy"))
    return [
        package / n
        for n in (
            "jit.py",
            "simd.py",
            "lowering.py",
            "sync.py",
            "raw.py",
            "attention.py",
            "bandwidth.py",
            "words.py",
            "program.py",
            "step.py",
            "dispatch.py",
            "ops.py",
            "kernels.py",
            "routing.py",
            "crc.py",
        )
    ] + formats


def cache_folder(root: Path | None = None) -> Path:
    """Where compiled kernels are kept: a folder named after all that their code depends on.

    numba itself notices an edit in a kernel's own file, not in a file whose functions it inlines.
    It does not use code compiled for a file in another place or of another time, so these count
    too: a folder that is there and marked complete serves this very installation.
    """
    digest = hashlib.sha256()
    for part in (numba.__version__, llvmlite.__version__, *target_features()):
        digest.update(part.encode() + b"\0")
    for source in kernel_sources():
        if source.exists():
            digest.update(f"{source}\0{source.stat().st_mtime_ns}\0".encode())
            digest.update(source.read_bytes() + b"\0")
    return (root or user_cache_path("moelite")) / "kernels" / digest.hexdigest()[:16]


CACHE_FOLDER = cache_folder()


def ours() -> bool:
    """Whether kernels are compiled and kept by us: not switched off, not redirected by the user."""
    return not (_settings.DISABLE_JIT or _settings.CACHE_DIR)


@contextmanager
def _our_cache() -> Iterator[None]:
    # numba reads its cache folder when a function is decorated; other users of numba in this
    # process keep theirs.
    before = _settings.CACHE_DIR
    _settings.CACHE_DIR = before or str(CACHE_FOLDER)
    try:
        yield
    finally:
        _settings.CACHE_DIR = before


def kernel(function: Callable[..., Any]) -> Any:
    """njit for an entry point: without the GIL, cached on disk, IEEE arithmetic (no fastmath)."""
    with _our_cache():
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)


def entry(function: Callable[..., Any], signature: Any) -> Any:
    """cfunc: compiled for one signature, called by its `.address`; cached on disk by its name."""
    _one_name(function, "")
    with _our_cache():
        return numba.cfunc(signature, cache=True, error_model="numpy")(function)


_named: set[tuple[str, str]] = set()


def _one_name(function: Callable[..., Any], tag: str) -> None:
    # Machine code from the cache is linked by name, and numba's names are the function's plus a
    # number that counts what this process has compiled. Two functions of one name, such as those a
    # factory makes, could then stand in for each other in a process that counts differently.
    if tag:
        function.__qualname__ += f".{tag}"
    name = function.__module__, function.__qualname__
    if name in _named:
        raise RuntimeError(f"two kernels are called {'.'.join(name)}: give each a tag of its own")
    _named.add(name)


def inner(function: Callable[..., Any], tag: str = "") -> Any:
    """njit for a function that only other kernels call: compiled into them, not cached alone.

    tag: tells apart the functions that a factory makes from one text.
    """
    _one_name(function, tag)
    return numba.njit(nogil=True, error_model="numpy")(function)


def inlined(function: Callable[..., Any], tag: str = "") -> Any:
    """As `inner`, but copied into its callers: for the bodies of innermost loops."""
    _one_name(function, tag)
    return numba.njit(nogil=True, error_model="numpy", inline="always")(function)
