"""How much memory torch's tensors take, counted operation by operation, by their storages."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """While entered: bytes held by what operations made, and the most of it at any time.

    Storages that share numpy's memory are not told apart from others; count them out by `known`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for key in [key for key, (ref, _) in self._alive.items() if ref.expired()]:
            self.now -= self._alive.pop(key)[1]
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                ref = StorageWeakRef(storage)
                if ref.cdata not in self._alive and storage._cdata not in self._alive:
                    self._alive[ref.cdata] = ref, storage.nbytes()
                    self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        return out
