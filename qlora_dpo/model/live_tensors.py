"""Counts the bytes of the tensors that exist at the same time, for fake tensors as well as real ones."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensorBytes(TorchDispatchMode):
    """Counts the bytes of tensors created inside the context: those alive `now`, and their `peak`.

    Tensors that existed before, and temporary memory inside a single operation, are not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._tracked = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and track the storages that it creates."""
        output = func(*args, **(kwargs or {}))
        input_storages = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(output):
            # a view shares the storage of its input, so it adds nothing
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in input_storages:
                self._track(leaf.untyped_storage())
        return output

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self._tracked:
            self._tracked.add(key)
            self.now += nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._untrack, key, nbytes)

    def _untrack(self, key: int, nbytes: int) -> None:
        self._tracked.discard(key)
        self.now -= nbytes
