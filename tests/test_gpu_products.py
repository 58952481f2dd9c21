"""moelite.gpu's kernels in torch, against float64 and the CPU's own kernels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

import gpu_checks  # noqa: E402

from moelite.errors import QuantizationError  # noqa: E402
from moelite.gpu.products import HostKernels, Kernels, kernels_for  # noqa: E402
from moelite.quant import FORMATS  # noqa: E402

KERNELS = kernels_for(gpu_checks.CPU, "torch")
HOST = kernels_for(gpu_checks.CPU)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("check", gpu_checks.BY_FORMAT, ids=lambda check: check.__name__)
def test_torch_agrees_for_every_format(check: Callable[..., None], name: str) -> None:
    check(KERNELS, name)


@pytest.mark.parametrize("check", gpu_checks.OTHERS, ids=lambda check: check.__name__)
def test_torch_agrees_on_what_has_no_format(check: Callable[..., None]) -> None:
    check(KERNELS)


def test_a_cpu_gets_torch_s_kernels_that_unpack_by_numpy() -> None:
    assert type(KERNELS) is Kernels
    assert type(HOST) is HostKernels
    for name in FORMATS:
        gpu_checks.BY_FORMAT[0](HOST, name)


def test_what_is_no_packed_matrix_is_refused() -> None:
    with pytest.raises(QuantizationError, match="no format is called 'int5'"):
        KERNELS.unpack("int5", torch.zeros(64, dtype=torch.uint8), 0, 8, 8)
    with pytest.raises(QuantizationError, match=r"uint8 \[n\], not torch.float32 \[8\]"):
        KERNELS.unpack("int8", torch.zeros(8), 0, 8, 8)


def test_the_cpu_path_imports_none_of_it() -> None:
    code = "import sys, moelite, moelite.engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
