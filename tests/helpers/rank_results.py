"""What the processes of a distributed test have found."""

import json
from pathlib import Path
from typing import Any

import distributed_scenarios
import pytest
import tiny_run
from safetensors.torch import load_file


class Together:
    """What `count` processes have found, and what one alone finds."""

    def __init__(self, count: int, folder: Path, zero: bool = False) -> None:
        self.count, self.folder = count, folder
        assert distributed_scenarios.launched(count, folder, zero) == [0] * count
        self.found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]

    def adapters(self, name: str) -> list[dict[str, Any]]:
        """The adapter of each process."""
        return [load_file(self.folder / f"{name}.{rank}.safetensors") for rank in range(self.count)]

    def insist_on_same(self, name: str, adapter: dict[str, Any], facts: dict[str, Any]) -> None:
        """Each process has the adapter and the figures that one alone has of the scenario `name`."""
        for found, theirs in zip(self.found, self.adapters(name), strict=True):
            assert tiny_run.all_apart(theirs, adapter) < 1e-5
            same(found[name], facts)


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Figures as those of one process, but for time: sums to 1e-5, counts exactly."""
    assert found["num_tokens"] == expected["num_tokens"]
    assert found["first_step_grad"] == pytest.approx(expected["first_step_grad"], rel=1e-5)
    assert found["margin_mean"] == pytest.approx(expected["margin_mean"], abs=1e-5)
    for one, other in zip(found["evals"], expected["evals"], strict=True):
        counts = {name: value for name, value in other.items() if isinstance(value, int)}
        assert {name: one[name] for name in counts} == counts
        # a margin that is rounding alone at step 0 has no correlation with anything
        named = {name for name in other if name not in {*counts, "seconds", "eval_length_correlation"}}
        for name in named:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name
