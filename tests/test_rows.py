"""Where memory asks for it, rows are smaller before anything is recomputed, and a resumed run has the same rows."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from accelerate.state import AcceleratorState
from workplace import rows

from qlora_dpo.model import processes
from qlora_dpo.model.budget import Kept, layers_to_checkpoint
from qlora_dpo.preference.layout import choose_rows, longest_alone, row_sizes, rows_that_fit
from qlora_dpo.recipe_train import ROW_TOKENS
from qlora_dpo.training import checkpoint, run
from qlora_dpo.training.checkpoint import State, folder_of
from qlora_dpo.training.tracker import METRICS, Tracker, read

pytestmark = jobs.LIBRARIES_WARN

TEN = Kept(layer=10.0, layer_input=1.0)
"""Bytes of a token: 40 in four layers, and 14 if all four are computed again. Of free bytes 0.8 are planned with."""
SMALL, AMPLE = 2 * 2**20, 2**34
"""Free bytes in which 2,048 tokens of the tiny model do not fit, and in which anything does."""


@pytest.mark.parametrize(
    ("free", "longest", "recomputed", "tokens"),
    [
        (102_400, 100, 0, 2048),
        (102_399, 100, 0, 1024),
        (51_199, 100, 0, 512),
        (51_199, 700, 0, 700),  # the longest pair goes through whole, so 512 would keep no less
        (35_000, 700, 0, 700),
        (0, 700, 0, 700),
        (0, 3000, 0, 2048),
        (35_840, 700, 4, 2048),
        (35_839, 700, 4, 1024),
    ],
)
def test_rows_are_halved_until_they_fit(free: int, longest: int, recomputed: int, tokens: int) -> None:
    assert rows_that_fit(TEN, 4, recomputed, longest, free) == tokens


def test_only_where_the_smallest_rows_do_not_fit_layers_are_recomputed() -> None:
    for free in (102_399, 51_199, 35_000):
        assert layers_to_checkpoint(TEN, 4, rows_that_fit(TEN, 4, 0, 700, free), free) == 0
    assert [layers_to_checkpoint(TEN, 4, rows_that_fit(TEN, 4, 0, 700, free), free) for free in (34_999, 0)] == [2, 4]
    assert list(row_sizes(300)) == [2048, 1024, 512, 300]


def test_a_padded_batch_has_both_sequences_at_the_length_of_the_longer() -> None:
    pairs = jobs.pairs(9)
    assert longest_alone(pairs, jobs.PACKED) == max(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    longer = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
    assert longest_alone(pairs, jobs.PADDED) == 2 * (longer + 1)  # and a column of padding


def test_all_processes_take_the_rows_of_the_one_with_the_least_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs, free = jobs.fresh(jobs.recipe()), jobs.pairs(9), 25_600  # 20 bytes a token in two layers: 1,024
    monkeypatch.setattr(processes, "_lengths", lambda number: [number, free])
    packing, why = choose_rows(model, jobs.PACKED, TEN, pairs, False, AMPLE)
    assert packing.token_budget == 1024
    assert why.startswith(
        "memory: rows of 1,024 tokens, since 2,048 would need 0.0 GiB, and of 0.0 GiB left for a step"
    )


@dataclass
class Ran:
    """A run of three steps that has a checkpoint after each of the first two."""

    folder: Path
    adapter: dict[str, torch.Tensor]
    state: State
    metrics: list[dict[str, Any]]
    said: list[str]


Train = Callable[..., Ran]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """Train where `free` bytes are free for a step, or go on from a run's first checkpoint."""
    home = tmp_path_factory.mktemp("rows")
    for name, some in (("train", rows(16)), ("eval", rows(4, 16))):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    data = {"train": str(home / "train.jsonl"), "eval": str(home / "eval.jsonl"), "max_length": 200}
    table = {"batch_size": 16, "num_train_epochs": 3, "save_steps": 1}

    def trained(free: int, tokens: int | str = "auto", resume: Ran | None = None, *allowed: str) -> Ran:
        AcceleratorState._reset_state(True)
        folder, said = home / str(len(list(home.iterdir()))), list[str]()
        folder.mkdir()
        what = jobs.recipe(data=data, train=table | {"micro_batch_tokens": tokens})
        before = folder_of(resume.folder, 1) if resume is not None else None
        patch.setattr(run, "free_bytes", lambda device: free)
        with Tracker(folder, 3) as tracker:
            tracker.note = said.append  # type: ignore[method-assign,assignment]
            outcome = run.run(run.prepare(what), what, jobs.CPU, tracker, before, allowed)
        return Ran(folder, jobs.adapter(outcome.model), outcome.state, read(folder / METRICS), said)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_DPO_CACHE", str(home / "cache"))
        yield trained


@pytest.fixture(scope="module")
def ample(train: Train) -> Ran:
    return train(AMPLE)


@pytest.fixture(scope="module")
def small(train: Train) -> Ran:
    return train(SMALL)


def test_where_there_is_room_auto_is_2048(train: Train, ample: Ran) -> None:
    number = train(AMPLE, ROW_TOKENS)
    assert jobs.all_apart(number.adapter, ample.adapter) == 0
    layouts = [[each for each in one.said if each.startswith(("layout:", "memory:"))] for one in (number, ample)]
    assert layouts[0] == layouts[1]
    assert (number.state.row_tokens, ample.state.row_tokens) == (None, ROW_TOKENS)


def test_where_there_is_none_rows_are_smaller_and_nothing_else_changes(ample: Ran, small: Ran) -> None:
    tokens = small.state.row_tokens
    assert tokens is not None and tokens < 1024  # so a step has several
    names = {"train": ("loss", "grad_norm"), "eval": ("eval_loss", "eval_kl")}
    for one, other in zip(small.metrics, ample.metrics, strict=True):
        assert (one["kind"], one["step"]) == (other["kind"], other["step"])
        for name in names[one["kind"]]:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7)
    said = "\n".join(small.said)
    why = r"since 2,048 would need \d\.\d GiB, and of 0\.0 GiB left for a step 0\.0 are planned with"
    assert re.search(rf"^memory: rows of {tokens:,} tokens, {why}$", said, re.MULTILINE)
    assert re.search(r"^memory: a backward pass over .* GiB are free: nothing is recomputed$", said, re.MULTILINE)


@pytest.mark.parametrize(("first", "then"), [("small", AMPLE), ("ample", SMALL)])
def test_a_resumed_run_keeps_its_rows_whatever_is_free_now(
    first: str, then: int, train: Train, request: pytest.FixtureRequest
) -> None:
    whole: Ran = request.getfixturevalue(first)
    again = train(then, "auto", whole)
    assert jobs.all_apart(again.adapter, whole.adapter) == 0
    assert again.state.row_tokens == whole.state.row_tokens
    assert f"memory: rows of {whole.state.row_tokens:,} tokens, as before" in again.said
    # what no longer fits is recomputed, as with a number
    assert any(each.endswith(": 2 of 2 layers are recomputed") for each in again.said) == (then == SMALL)


def test_a_number_that_is_allowed_takes_the_place_of_auto(train: Train, small: Ran) -> None:
    number = train(SMALL, 300, small, "train.micro_batch_tokens")
    assert number.state.row_tokens is None
    assert jobs.all_apart(number.adapter, small.adapter) < 1e-4


def state(tokens: int | str, found: int | None) -> State:
    recipe = jobs.recipe(train={"micro_batch_tokens": tokens}).model_dump(exclude_none=True)
    return State(1, recipe, {}, row_tokens=found)


@pytest.mark.parametrize(
    ("tokens", "found", "goes_on"),
    [(2048, None, 2048), (2048, 512, 512), ("auto", 1024, 1024), ("auto", None, None)],
)
def test_a_checkpoint_says_in_which_rows_its_run_goes_on(
    tokens: int | str, found: int | None, goes_on: int | None, tmp_path: Path
) -> None:
    (tmp_path / "state.json").write_text(json.dumps(vars(state(tokens, found)) | {"since_eval": {}}))
    assert checkpoint.rows_before(tmp_path) == goes_on


def test_a_number_of_before_may_become_auto_and_no_number_another_unasked() -> None:
    assert checkpoint._differences(state(2048, None), state("auto", 2048)) == {}
    for was, now in (("auto", 512), (2048, 512)):
        assert list(checkpoint._differences(state(was, 2048), state(now, None))) == ["train.micro_batch_tokens"]
