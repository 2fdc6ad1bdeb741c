"""The states of all random generators of a run, as tensors: torch's, numpy's and Python's."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def get_rng_states() -> dict[str, Tensor]:
    """The states of all generators as integers and one float each; no pickle."""
    _, words, gauss = random.getstate()
    numpy: Any = np.random.get_state()
    _, keys, *rest = numpy
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": _optional(gauss),
        "numpy": torch.tensor(keys.astype(np.int64)),
        "numpy_rest": torch.tensor([float(value) for value in rest], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_rng_states(states: dict[str, Tensor]) -> None:
    """Restore what `get_rng_states` returned; states of GPUs that this machine lacks are skipped."""
    torch.set_rng_state(states["torch"])
    gauss: Any = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss, cached = states["numpy_rest"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    for index in range(torch.cuda.device_count()):
        if (state := states.get(f"cuda:{index}")) is not None:
            torch.cuda.set_rng_state(state, index)


def _optional(value: float | None) -> Tensor:
    return torch.tensor([] if value is None else [value], dtype=torch.float64)
