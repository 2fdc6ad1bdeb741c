"""Where memory asks for it, rows are smaller before anything is recomputed, and a resumed run has the same rows."""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState
from cli_sandbox import rows

from qlora_dpo.model.activation_memory import ActivationBytes
from qlora_dpo.model.decoder_layers import checkpointable_layers
from qlora_dpo.model.device import device_for_gpu
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.gpu_specs import GPU_SPECS
from qlora_dpo.planning.memory_estimate import RESERVED_BYTES, estimate_memory
from qlora_dpo.preference import packing_choice, reference
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.train import DEFAULT_ROW_TOKENS, TrainTable
from qlora_dpo.tracking.run_log import METRICS, RunLog, read_metrics
from qlora_dpo.training import build_model, run
from qlora_dpo.training.checkpoint import save
from qlora_dpo.training.checkpoint.save import checkpoint_dir
from qlora_dpo.training.checkpoint.state import TrainState
from qlora_dpo.training.memory import footprint
from qlora_dpo.training.memory.footprint import ModelFootprint, measure_footprint
from qlora_dpo.training.memory.row_plan import (
    RowPlan,
    choose_row_plan,
    dense_weight_budget,
    describe_row_plan,
    reference_bytes,
    reference_row_tokens,
    row_token_candidates,
    step_bytes,
    total_step_bytes,
)
from qlora_dpo.training.memory.workload import Workload, workload_of
from qlora_dpo.training.prepare import prepare_data

pytestmark = tiny_run.LIBRARIES_WARN

SMALL, AMPLE = 2**23, 2**34
"""Free bytes in which 2,048 tokens of the tiny model do not fit, and in which anything does."""
T4 = device_for_gpu(GPU_SPECS["t4"])


def shapes(**changes: Any) -> ModelFootprint:
    """Four layers that keep 10 bytes of a token each and 1 of their input, and nothing else that takes any.

    A token takes 40 bytes then, 14 if all four are computed again, and a twentieth more for fragmentation; of free
    bytes 0.9 are planned with.
    """
    nothing: dict[str, Any] = {
        name: 0
        for name in inspect.signature(ModelFootprint).parameters
        if name not in ("weight_bytes", "padding_reason")
    }
    told = {
        "num_layers": 4,
        "activations": ActivationBytes(layer=10.0, layer_input=1.0),
        "fragmentation": 0.05,
        "weight_bytes": {},
        "padding_reason": "",
    }
    return ModelFootprint(**nothing | told | changes)


def table(**keys: Any) -> TrainTable:
    return TrainTable(**keys)


@pytest.mark.parametrize(
    ("free", "layers"),
    [(10**6, 0), (93_334, 0), (93_333, 2), (74_667, 2), (74_666, 3), (53_667, 3), (53_666, 4), (0, 4)],
)
def test_as_few_layers_as_needed_are_recomputed(free: int, layers: int) -> None:
    # 2,000 tokens: 80,000 bytes for none, 64,000 for two, 46,000 for three, each and a twentieth more
    assert choose_row_plan(shapes(), table(micro_batch_tokens=2000), 100, free) == RowPlan(2000, layers)


@pytest.mark.parametrize(
    ("free", "longest", "all_layers", "tokens"),
    [
        (95_574, 100, False, 2048),
        (95_573, 100, False, 1024),
        (47_787, 100, False, 1024),
        (47_786, 100, False, 512),
        (47_786, 700, False, 700),  # the longest pair goes through whole, so 512 would keep no less
        (0, 700, False, 700),
        (0, 3000, False, 2048),
        (33_452, 700, True, 2048),
        (33_451, 700, True, 1024),
    ],
)
def test_rows_are_halved_until_they_fit(free: int, longest: int, all_layers: bool, tokens: int) -> None:
    what = table(gradient_checkpointing=True if all_layers else "auto")
    assert choose_row_plan(shapes(), what, longest, free).tokens == tokens
    assert list(row_token_candidates(300)) == [2048, 1024, 512, 300]


def test_only_where_the_smallest_rows_do_not_fit_layers_are_recomputed() -> None:
    found = [choose_row_plan(shapes(), table(), 700, free) for free in (95_573, 47_786, 32_667, 32_666, 0)]
    assert [(each.tokens, each.recomputed_layers) for each in found] == [
        (1024, 0),
        (700, 0),
        (700, 0),
        (700, 2),
        (700, 4),
    ]


def test_what_does_not_grow_with_the_tokens_counts_once() -> None:
    # a head of 10,000 bytes in the compute dtype leaves 1,024 tokens of what 2,048 would fit in
    parts = step_bytes(shapes(head_copy_bytes=10_000), 2048, 0)
    assert parts["the output head in the compute dtype"] == 10_000
    assert parts["activations of 2,048 tokens, nothing recomputed"] == 40 * 2048
    assert choose_row_plan(shapes(head_copy_bytes=10_000), table(), 100, 95_574).tokens == 1024
    assert choose_row_plan(shapes(head_copy_bytes=10_000), table(), 100, 107_240).tokens == 2048
    assert "the output head in the compute dtype" not in step_bytes(shapes(), 2048, 0)


def test_the_heads_tiles_are_gone_before_a_layer_works_on_its_gradients() -> None:
    working = shapes(
        activations=ActivationBytes(layer=10.0, layer_input=1.0, working=3.0),
        head_tile_bytes=5000,
        head_bytes_per_token=2,
        vocab_size=7,
    )
    head = "output head in chunks of 256 tokens, 7 words, beyond that"
    for tokens, beyond in ((1000, 2000), (3000, 0)):
        parts = step_bytes(working, tokens, 0)
        assert (parts["backward pass of one layer, while it works"], parts[head]) == (3 * tokens, beyond + 2 * tokens)


@pytest.mark.parametrize(
    ("asked", "free", "recomputed", "says"),
    [
        (True, 2**34, 4, "16.0 GiB are free: 4 of 4 layers are recomputed, as the recipe says"),
        (False, 0, 0, "0.0 GiB are free: nothing is recomputed, as the recipe says"),
        ("auto", 2**34, 0, "16.0 GiB are free: nothing is recomputed"),
        ("auto", 0, 4, "0.0 GiB are free: 4 of 4 layers are recomputed"),
    ],
)
def test_the_recipe_or_memory_decides_and_it_is_said(asked: Any, free: int, recomputed: int, says: str) -> None:
    what, large = table(gradient_checkpointing=asked, micro_batch_tokens=512), shapes(head_tile_bytes=2**31)
    rows = choose_row_plan(large, what, 100, free)
    assert rows == RowPlan(512, recomputed)
    assert describe_row_plan(large, what, rows, 100, free) == [f"a backward pass over 512 tokens needs 2.1 GiB, {says}"]


def test_why_rows_are_smaller_is_said_first() -> None:
    large = shapes(activations=ActivationBytes(layer=2.0**18, layer_input=1.0))
    rows = choose_row_plan(large, table(), 100, 2**31)
    assert describe_row_plan(large, table(), rows, 100, 2**31) == [
        "rows of 1,024 tokens, since 2,048 would need 2.1 GiB, and of 2.0 GiB left for a step 1.8 are planned with",
        "a backward pass over 1,024 tokens needs 1.1 GiB, 2.0 GiB are free: nothing is recomputed",
    ]
    again = choose_row_plan(large, table(), 100, 2**31, resumed_row_tokens=2048)
    assert describe_row_plan(large, table(), again, 100, 2**31) == [
        "rows of 2,048 tokens, as before",
        "a backward pass over 2,048 tokens needs 2.1 GiB, 2.0 GiB are free: 2 of 4 layers are recomputed",
    ]


def test_on_a_gpu_weights_are_kept_dense_only_beside_full_rows_of_which_nothing_is_recomputed() -> None:
    wide, step = shapes(dense_bytes=4000, head_copy_bytes=10_000), 96_516
    for free, left in ((107_240, 10_000), (111_690, 14_005), (2**20, 2**20 * 9 // 10 - step + 10_000)):
        assert dense_weight_budget(wide, table(), 100, free, T4) == left
    assert dense_weight_budget(wide, table(), 100, 100_000, T4) == 3484  # less than the head, which a step converts
    # smaller rows and recomputed layers leave more room, if the recipe has them
    assert dense_weight_budget(shapes(), table(micro_batch_tokens=100), 50, 10_000, T4) == 9000 - 4200
    every = table(micro_batch_tokens=100, gradient_checkpointing=True)
    assert dense_weight_budget(shapes(), every, 50, 10_000, T4) == 9000 - 1470
    assert dense_weight_budget(shapes(), table(), 100, 10_000, T4) == 0
    # where rows are smaller anyway, a CPU gains more from weights that it need not convert
    assert dense_weight_budget(shapes(), table(), 100, 10_000, tiny_run.CPU) == 4500


@pytest.mark.parametrize(("of_token", "tokens"), [(1.0, 8 * 2048), (20.0, 4096), (40.0, 2048), (100.0, 2048)], ids=str)
def test_the_reference_pass_has_rows_that_take_no_more_than_a_step_on_a_gpu(of_token: float, tokens: int) -> None:
    some = shapes(activations=ActivationBytes(layer=10.0, layer_input=1.0, forward=of_token))
    assert reference_row_tokens(some, RowPlan(2048, 0), 100, T4) == tokens
    assert reference_row_tokens(some, RowPlan(2048, 0), 100, tiny_run.CPU) == 2048
    assert (reference_bytes(some, tokens) <= total_step_bytes(some, 2048, 0)) == (of_token <= 40)


def test_the_longest_pair_alone_is_as_long_as_it_is_laid_out() -> None:
    pairs = tiny_run.pairs(9)
    side: Any = SimpleNamespace(encoded=pairs)
    found = workload_of(side, side, tiny_run.recipe())
    assert found.longest_pair_tokens(padded=False) == max(
        len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs
    )
    longer = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
    assert found.longest_pair_tokens(padded=True) == 2 * (longer + 1)  # and a column of padding
    # of one epoch a step's pairs are asked before the first step, of more all of them, and always those held out
    whole = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    few: Any = SimpleNamespace(encoded=pairs[:1])
    step = 4 * found.longest_pair_tokens(padded=False)
    assert step < whole == found.reference_tokens
    assert workload_of(side, few, tiny_run.recipe()).reference_tokens == step
    assert workload_of(side, few, tiny_run.recipe(train={"num_train_epochs": 2})).reference_tokens == whole
    assert (
        workload_of(side, few, tiny_run.recipe(train={"num_train_epochs": 2, "max_steps": 1})).reference_tokens == step
    )


def test_a_layout_is_proved_in_rows_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, most, whole = tiny_run.pairs(8, longest_prompt=90, longest_answer=40), list[int](), packing_choice.collate

    def collate(some: Any, packing: Any) -> Any:
        batch = whole(some, packing)
        most.append(batch.input_ids_BL.numel() if len(some) > 1 else 0)  # a pair alone goes through whole
        return batch

    for module in (packing_choice, reference):  # the leak check, and the log-probabilities
        monkeypatch.setattr(module, "collate", collate)
    packing, _ = packing_choice.choose_packing(
        tiny_run.base_model(), pairs, replace(tiny_run.PADDED, token_budget=200), tiny_run.CPU
    )
    assert packing.backend == "spans" and 100 < max(most) <= 200
    assert len(most) > 3 * 2  # padded, packed, and to see whether tokens mix


@dataclass
class Ran:
    """A run of three steps that has a checkpoint after each of the first two."""

    folder: Path
    adapter: dict[str, torch.Tensor]
    state: TrainState
    metrics: list[dict[str, Any]]
    said: list[str]
    recomputed: int
    """Layers."""
    recipe: Recipe
    load: Workload


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
        what = tiny_run.recipe(data=data, train=table | {"micro_batch_tokens": tokens})
        before = checkpoint_dir(resume.folder, 1) if resume is not None else None
        patch.setattr(build_model, "free_bytes", lambda device: free)
        with RunLog(folder, 3) as tracker:
            prepared, options = prepare_data(what), run.RunOptions(allowed_changes=allowed)
            with tiny_run.logged_sentences(said):
                outcome = run.train_prepared(prepared, tiny_run.CPU, tracker, options, run.RunHooks(), before)
        recomputed = sum(layer.gradient_checkpointing for layer in checkpointable_layers(outcome.model))
        load, metrics = workload_of(prepared.train, prepared.heldout, what), read_metrics(folder / METRICS)
        return Ran(folder, tiny_run.adapter(outcome.model), outcome.state, metrics, said, recomputed, what, load)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_DPO_CACHE", str(home / "cache"))
        yield trained


@pytest.fixture(scope="module")
def ample(train: Train) -> Ran:
    return train(AMPLE)


@pytest.fixture(scope="module")
def small(train: Train) -> Ran:
    return train(SMALL)


@pytest.mark.parametrize("free", [SMALL // 4, SMALL, pytest.param(2 * SMALL, marks=pytest.mark.slow), AMPLE])
def test_check_plans_the_rows_that_a_run_takes(free: int, train: Train) -> None:
    ran = train(free)
    found = measure_footprint(tiny_run.source(), ran.recipe, tiny_run.CPU, ran.load)
    # what a run has taken when it looks at the free memory, and what is reserved for the libraries
    taken = sum(found.weight_bytes.values()) + 4 * found.num_trainable + RESERVED_BYTES["cpu"]
    plan = estimate_memory(tiny_run.source(), ran.recipe, tiny_run.CPU, ran.load, free + taken)
    assert ran.load.step_tokens > DEFAULT_ROW_TOKENS  # so the plan is for full rows too
    assert (plan.row_tokens, plan.recomputed_layers) == (ran.state.row_tokens, ran.recomputed)
    assert plan.smaller_rows_reason == ", ".join(
        each.removeprefix("memory: ") for each in ran.said if "since 2,048" in each
    )


def test_a_footprint_is_measured_once_by_the_same_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In this process and, by a file, in later ones; a damaged file is as good as none."""
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path))
    asked = tiny_run.source(), tiny_run.recipe(lora={"r": 3}), tiny_run.CPU, Workload(40, 300, 60)
    measure, measured = footprint._measure_footprint, list[ModelFootprint]()

    def counted(*given: Any) -> ModelFootprint:
        measured.append(measure(*given))
        return measured[-1]

    monkeypatch.setattr(footprint, "_measure_footprint", counted)
    monkeypatch.setattr(footprint, "_footprints", {})
    first = measure_footprint(*asked)
    (file,) = (tmp_path / "footprints").iterdir()

    def later() -> ModelFootprint:
        monkeypatch.setattr(footprint, "_footprints", {})
        return measure_footprint(*asked)

    assert later() == first
    assert len(measured) == 1
    file.write_text(file.read_text()[:-9])
    assert later() == first
    assert len(measured) == 2
    monkeypatch.setattr(footprint, "_code_digest", lambda: "another version")
    assert later() == first
    assert len(measured) == 3
    assert len(list((tmp_path / "footprints").iterdir())) == 2
    monkeypatch.setattr(footprint, "_code_digest", lambda: "one that fails, and may succeed another time")
    monkeypatch.setattr(footprint, "_measure_footprint", lambda *given: replace(first, unplanned_reason="no reason"))
    assert later().unplanned_reason
    assert len(list((tmp_path / "footprints").iterdir())) == 2


def test_where_there_is_room_auto_is_2048(train: Train, ample: Ran) -> None:
    number = train(AMPLE, DEFAULT_ROW_TOKENS)
    assert tiny_run.all_apart(number.adapter, ample.adapter) == 0
    layouts = [[each for each in one.said if each.startswith(("layout:", "memory:"))] for one in (number, ample)]
    assert layouts[0] == layouts[1]
    assert (number.state.row_tokens, ample.state.row_tokens) == (None, DEFAULT_ROW_TOKENS)


def test_where_there_is_none_rows_are_smaller_and_nothing_else_changes(ample: Ran, small: Ran) -> None:
    tokens = small.state.row_tokens
    assert tokens is not None and tokens < 1024  # so a step has several
    names = {"train": ("loss", "grad_norm"), "eval": ("eval_loss", "eval_kl")}
    for one, other in zip(small.metrics, ample.metrics, strict=True):
        assert (one["kind"], one["step"]) == (other["kind"], other["step"])
        for name in names[one["kind"]]:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7)
    said = "\n".join(small.said)
    why = r"since 2,048 would need 0\.0 GiB, and of 0\.0 GiB left for a step 0\.0 are planned with"
    assert re.search(rf"^memory: rows of {tokens:,} tokens, {why}$", said, re.MULTILINE)
    assert re.search(r"^memory: a backward pass over .* GiB are free: nothing is recomputed$", said, re.MULTILINE)


@pytest.mark.parametrize(("first", "then"), [("small", AMPLE), ("ample", SMALL)])
def test_a_resumed_run_keeps_its_rows_whatever_is_free_now(
    first: str, then: int, train: Train, request: pytest.FixtureRequest
) -> None:
    whole: Ran = request.getfixturevalue(first)
    again = train(then, "auto", whole)
    assert tiny_run.all_apart(again.adapter, whole.adapter) == 0
    assert again.state.row_tokens == whole.state.row_tokens
    assert f"memory: rows of {whole.state.row_tokens:,} tokens, as before" in again.said
    # what no longer fits is recomputed, as with a number
    assert any(each.endswith(": 2 of 2 layers are recomputed") for each in again.said) == (then == SMALL)


def test_all_processes_take_the_rows_of_the_one_with_the_least_memory(
    train: Train, small: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = sum(each.numel() for each in small.adapter.values())
    left = SMALL - 12 * trained  # beside gradients and AdamW's moments
    monkeypatch.setattr(processes, "_rows_per_rank", lambda number: [number, left])
    found = train(AMPLE)
    assert found.state.row_tokens == small.state.row_tokens
    assert [each for each in found.said if each.startswith("memory:")] == [
        each for each in small.said if each.startswith("memory:")
    ]


def test_a_number_that_is_allowed_takes_the_place_of_auto(train: Train, small: Ran) -> None:
    number = train(SMALL, 300, small, "train.micro_batch_tokens")
    assert number.state.row_tokens is None
    assert tiny_run.all_apart(number.adapter, small.adapter) < 1e-4


def state(tokens: int | str, found: int | None) -> TrainState:
    recipe = tiny_run.recipe(train={"micro_batch_tokens": tokens}).model_dump(exclude_none=True)
    return TrainState(1, recipe, {}, row_tokens=found)


@pytest.mark.parametrize(
    ("tokens", "found", "goes_on"),
    [(2048, None, 2048), (2048, 512, 512), ("auto", 1024, 1024), ("auto", None, None)],
)
def test_a_checkpoint_says_in_which_rows_its_run_goes_on(
    tokens: int | str, found: int | None, goes_on: int | None, tmp_path: Path
) -> None:
    (tmp_path / "state.json").write_text(json.dumps(vars(state(tokens, found)) | {"since_eval": {}}))
    assert save.saved_row_tokens(tmp_path) == goes_on


def test_a_number_of_before_may_become_auto_and_no_number_another_unasked() -> None:
    assert save._resume_differences(state(2048, None), state("auto", 2048)) == {}
    for was, now in (("auto", 512), (2048, 512)):
        assert list(save._resume_differences(state(was, 2048), state(now, None))) == ["train.micro_batch_tokens"]
