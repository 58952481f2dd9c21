"""A whole model through Triton's kernels in Triton's interpreter, beside the CPU path.

`TRITON_INTERPRET=1 python tests/gpu_interpreted.py FOLDER` prints the largest relative error of a
logit for each store in the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gpu_checks
import numpy as np
import torch

import moelite
from moelite.gpu import model as model_file
from moelite.gpu.products import kernels_for


def main(folder: Path) -> None:
    gpu_checks.let_arrays_of_one_be_numbers()
    np.seterr(all="ignore")  # masked lanes divide by zero
    torch.set_num_threads(1)
    model_file.kernels_for = lambda device: kernels_for(device, "triton")
    how: dict[str, Any] = {"ram": "1GiB", "context": 32, "threads": 1}
    for store in sorted(folder.glob("*.store")):
        ids = [5, 9, 23, 41]
        with moelite.load(store, **how) as model:
            want = model.forward(ids)
        with moelite.load(store, **how, device="torch:cpu", vram="1GiB", miss="copy") as model:
            session = model.session()
            # a chunk, tokens layer by layer, and, once nothing is missing, tokens in one look
            found = [session.append(ids[:2]), *(session.append([i]) for i in ids[2:])]
            session.truncate(2)
            again = [session.append([i]) for i in ids[2:]]
            assert model._decoder._graph is not None, "no token was done in one look"
        for got in (np.concatenate(found), np.concatenate([found[0], *again])):
            sys.stdout.write(f"{store.stem} {np.abs(got - want).max() / np.abs(want).max()}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
