"""The reference is computed once, cached on disk, and checked to be the base and to match the policy."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from qlora_dpo.errors import EXIT_DOES_NOT_FIT, REDUCE_MEMORY_ADVICE, DoesNotFitError, ModelError
from qlora_dpo.files import cache_home
from qlora_dpo.preference import reference, reference_cache
from qlora_dpo.preference.pack import collate
from qlora_dpo.preference.reference import batch_reference_logps, compute_reference_logps, model_logps
from qlora_dpo.preference.reference_cache import ReferenceLogpCache, read_logp_table, reference_cache_dir
from qlora_dpo.preference.start_checks import check_adapter_off_is_base, check_first_loss, probe_logits
from qlora_dpo.recipe import Recipe
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training import oom_retry, run
from qlora_dpo.training.prepare import prepare_data
from qlora_dpo.training.run import RunHooks, RunOptions, TrainingResult, train_prepared

pytestmark = tiny_run.LIBRARIES_WARN

PAIRS = tiny_run.pairs(9)
SMALL_ROWS = replace(tiny_run.PACKED, token_budget=64)


def ask(model: Any, folder: Path, pairs: list[Any] = PAIRS, advance: Any = lambda pairs: None) -> tuple[Any, int]:
    store = ReferenceLogpCache(folder)
    return compute_reference_logps(model, pairs, store, SMALL_ROWS, tiny_run.CPU, advance), store.local_computed


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_reference_is_the_base_although_the_adapter_is_attached(quantization: str, tmp_path: Path) -> None:
    base = tiny_run.base_model(quantization)
    untouched = torch.cat([model_logps(base, [pair], tiny_run.PACKED, tiny_run.CPU) for pair in PAIRS])
    tuned = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe(quantization)))
    asked, computed = ask(tuned, tmp_path)
    torch.testing.assert_close(asked, untouched, rtol=1e-5, atol=1e-5)
    assert computed == len(PAIRS)
    assert not torch.allclose(model_logps(tuned, PAIRS, tiny_run.PACKED, tiny_run.CPU), untouched, atol=1e-3)


def test_the_second_time_nothing_is_computed_and_the_same_is_known(tmp_path: Path) -> None:
    first, _ = ask(tiny_run.base_model(), tmp_path)
    again, computed = ask(None, tmp_path, list(reversed(PAIRS)))
    assert computed == 0
    assert torch.equal(again.flip(0), first)


def test_progress_counts_known_pairs_at_once_and_new_ones_as_they_are_done(tmp_path: Path) -> None:
    ask(tiny_run.base_model(), tmp_path, PAIRS[:4])
    told: list[int] = []
    ask(tiny_run.base_model(), tmp_path, advance=told.append)
    assert (told[0], sum(told)) == (4, len(PAIRS))


def test_only_new_pairs_are_computed_and_equal_ones_only_once(tmp_path: Path) -> None:
    model = tiny_run.base_model()
    ask(model, tmp_path, PAIRS[:4])
    known, computed = ask(model, tmp_path, [*PAIRS, *PAIRS])
    assert (computed, known.shape) == (5, (18, 2))


def test_all_that_was_computed_before_a_stop_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_cache, "SECONDS_BETWEEN_SAVES", 0.0)
    done: list[int] = []

    def stop_at_the_third(pairs: int) -> None:
        done.append(pairs)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(tiny_run.base_model(), tmp_path, advance=stop_at_the_third)
    assert ask(tiny_run.base_model(), tmp_path)[1] == len(PAIRS) - sum(done)


@pytest.mark.parametrize("damage", ["a flipped bit", "cut in half", "emptied", "of another name"])
def test_a_damaged_cache_file_is_named_and_never_used(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = ask(tiny_run.base_model(), tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    match damage:
        case "a flipped bit":
            file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        case "cut in half":
            file.write_bytes(content[: len(content) // 2])
        case "emptied":
            file.write_bytes(b"")
        case "of another name":
            file = file.rename(tmp_path / f"{'0' * 64}.safetensors")
    assert len(read_logp_table(tmp_path)) == 0
    assert caplog.messages == [f"{file}: is damaged and not used; the log-probabilities it held are computed again"]
    again, computed = ask(tiny_run.base_model(), tmp_path)
    assert computed == len(PAIRS)
    assert torch.equal(again, first)


def test_the_cache_is_kept_apart_by_all_that_changes_the_reference(own_cache: Path, tmp_path: Path) -> None:
    source, table = tiny_run.source(), tiny_run.recipe().model
    other = shutil.copytree(source.folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({**weights, "model.norm.weight": 2 * weights["model.norm.weight"]}, other / "model.safetensors")
    other_weights = tiny_run.sources.ModelSource(source.name, other)
    folders = {
        reference_cache_dir(source, table, tiny_run.CPU),
        reference_cache_dir(other_weights, table, tiny_run.CPU),
        reference_cache_dir(source, table.model_copy(update={"quantization": "nf4"}), tiny_run.CPU),
        reference_cache_dir(
            source, table.model_copy(update={"quantization": "nf4", "double_quant": False}), tiny_run.CPU
        ),
        reference_cache_dir(source, table, tiny_run.device.select_device("bf16")),
    }
    assert len(folders) == 5
    assert reference_cache_dir(source, table.model_copy(update={"double_quant": False}), tiny_run.CPU) in folders
    assert {folder.parent for folder in folders} == {own_cache / "reference"}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_guard_lets_an_untrained_adapter_pass(quantization: str, dtype: Any) -> None:
    place = tiny_run.device.select_device(dtype)
    base = tiny_run.base_model(quantization, place)
    before_LV = probe_logits(base, PAIRS[0], place)
    model = tiny_run.attach_lora(base, tiny_run.recipe().lora, seed=42)
    check_adapter_off_is_base(model, before_LV, PAIRS[0], tiny_run.PACKED, place)


def test_the_guard_refuses_an_adapter_that_changes_the_base() -> None:
    base = tiny_run.base_model()
    before_LV = probe_logits(base, PAIRS[0], tiny_run.CPU)
    pissa = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights="pissa")
    )
    with pytest.raises(ModelError) as error:
        check_adapter_off_is_base(pissa, before_LV, PAIRS[0], tiny_run.PACKED, tiny_run.CPU)
    assert str(error.value) == (
        "with its adapter off the model differs from the base as loaded, so it cannot be the DPO reference; "
        "use an adapter that leaves the base as it is"
    )


def test_the_guard_refuses_an_adapter_that_is_not_untrained() -> None:
    base = tiny_run.base_model()
    before_LV = probe_logits(base, PAIRS[0], tiny_run.CPU)
    model = tiny_run.stirred(tiny_run.attach_lora(base, tiny_run.recipe().lora, seed=42))
    with pytest.raises(ModelError) as error:
        check_adapter_off_is_base(model, before_LV, PAIRS[0], tiny_run.PACKED, tiny_run.CPU)
    assert str(error.value) == "the untrained adapter changes the model, so the first loss would not be ln 2"
    check_adapter_off_is_base(model, before_LV, PAIRS[0], tiny_run.PACKED, tiny_run.CPU, fresh=False)


def test_the_first_loss_is_ln_2_or_the_run_is_refused(own_cache: Path) -> None:
    right_P2 = model_logps(tiny_run.base_model(), PAIRS, tiny_run.PACKED, tiny_run.CPU)
    check_first_loss(right_P2, right_P2.clone(), 0.1, tiny_run.CPU)
    wrong_P2 = right_P2 - torch.tensor([1.0, 0.0])
    with pytest.raises(ModelError) as error:
        check_first_loss(right_P2, wrong_P2, 0.1, tiny_run.CPU)
    # every margin is 1 nat: ln(1 + e^-0.1)
    assert str(error.value) == (
        "the first DPO loss would be 0.644397 instead of ln 2 = 0.693147: the cached reference does not belong "
        f"to this model; delete {cache_home() / 'reference'} and start again"
    )


def test_another_rate_rank_seed_or_beta_asks_the_reference_nothing(own_cache: Path, tmp_path: Path) -> None:
    first = whole_run(tmp_path / "first", {})
    assert first.reference_pairs_computed == 12
    for name, other in {
        "rate": {"train": {"learning_rate": 1e-5}},
        "rank": {"lora": {"r": 2}},
        "seed": {"train": {"seed": 7}},
        "beta": {"objective": {"beta": 0.5}},
    }.items():
        assert whole_run(tmp_path / name, other).reference_pairs_computed == 0, name
    assert whole_run(tmp_path / "nf4", {"model": {"quantization": "nf4"}}).reference_pairs_computed == 12


def test_a_reference_that_rides_along_is_the_one_that_was_asked_before(tmp_path: Path) -> None:
    model = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe("nf4"))).train()
    before, _ = ask(model, tmp_path)
    batch = collate(PAIRS, tiny_run.PACKED)
    along = batch_reference_logps(model, batch, tiny_run.CPU)
    torch.testing.assert_close(along, before, rtol=1e-5, atol=1e-5)
    assert model.training
    assert not along.requires_grad


def test_in_its_only_epoch_each_pair_is_asked_along_with_its_step(own_cache: Path, tmp_path: Path) -> None:
    first = whole_run(tmp_path / "first", {"train": {"max_steps": 1}})
    assert first.reference_pairs_computed == 4 + 4  # those of the step, and the held-out ones
    along = whole_run(tmp_path / "along", {})
    assert along.reference_pairs_computed == 4
    from_cache = whole_run(tmp_path / "cached", {})
    assert from_cache.reference_pairs_computed == 0
    assert tiny_run.all_apart(tiny_run.adapter(from_cache.model), tiny_run.adapter(along.model)) < 1e-5


def test_with_more_epochs_the_reference_is_asked_before_the_first_step(own_cache: Path, tmp_path: Path) -> None:
    epochs = {"train": {"num_train_epochs": 2, "max_steps": 3}}
    assert whole_run(tmp_path / "epochs", epochs).reference_pairs_computed == 8 + 4
    along = {"train": {"num_train_epochs": 1}}
    assert whole_run(tmp_path / "along", along).reference_pairs_computed == 0


SEVERAL_ROWS = {"train": {"num_train_epochs": 2, "max_steps": 3, "micro_batch_tokens": 160}}


def fails_above(monkeypatch: pytest.MonkeyPatch, tokens: int, after: int = 0) -> list[int]:
    """Let a row of the reference pass with more tokens run out of memory, from the pass `after` so many on; the pairs
    of all passes that did not.
    """
    whole, passes, done = reference.model_logps, list[int](), list[int]()

    def live(model: Any, pairs: Any, packing: Any, device: Any) -> torch.Tensor:
        passes.append(len(pairs))
        found = whole(model, pairs, packing, device)
        if len(passes) > after and collate(pairs, packing).input_ids_BL.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        done.append(len(pairs))
        return found

    monkeypatch.setattr(reference, "model_logps", live)
    return done


def test_a_reference_pass_that_did_not_fit_goes_on_in_smaller_rows(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="qlora_dpo")
    whole = whole_run(tmp_path / "whole", SEVERAL_ROWS)
    assert "out of memory" not in caplog.text
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / "another"))
    done = fails_above(monkeypatch, 120, after=1)
    again = whole_run(tmp_path / "again", SEVERAL_ROWS)
    told = [message for message in caplog.messages if "out of memory" in message]
    assert told == ["reference pass: out of memory with rows of 160 tokens; rows of 80 from here on"]
    # what was computed before it ran out is not computed again, and the held-out pairs are in the smaller rows at once
    assert again.reference_pairs_computed == sum(done) == 8 + 4 == whole.reference_pairs_computed
    assert done == [4, *[1] * 8]
    assert tiny_run.all_apart(tiny_run.adapter(again.model), tiny_run.adapter(whole.model)) < 1e-5


def test_progress_counts_a_pair_once_although_the_pass_began_anew(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[int]()

    @contextmanager
    def phase(tracker: RunLog, name: str, total: int) -> Iterator[Callable[[int], None]]:
        yield told.append if name == "reference" else (lambda count: None)

    monkeypatch.setattr(RunLog, "phase", phase)
    fails_above(monkeypatch, 120, after=1)
    whole_run(tmp_path / "run", SEVERAL_ROWS)
    assert sum(told) == 8 + 4 and min(told) > 0


def test_a_reference_pass_that_fits_in_no_rows_ends_the_run(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_above(monkeypatch, 0)
    with pytest.raises(DoesNotFitError) as error:
        whole_run(tmp_path / "run", SEVERAL_ROWS)
    assert (
        str(error.value)
        == f"reference pass: out of memory {oom_retry.MAX_HALVINGS + 1} times in a row; {REDUCE_MEMORY_ADVICE}"
    )
    assert error.value.exit_code == EXIT_DOES_NOT_FIT


def test_a_policy_that_does_not_start_as_its_reference_ends_the_run(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run.precompute_reference_logps

    def with_another_policy(prepared: Any, loaded: Any, *others: Any) -> Any:
        tiny_run.stirred(loaded.model)
        return whole(prepared, loaded, *others)

    monkeypatch.setattr(run, "precompute_reference_logps", with_another_policy)
    with pytest.raises(ModelError, match=r"^the first DPO loss would be 0\.\d{6} instead of ln 2 = 0\.693147: "):
        whole_run(tmp_path / "run", {})


def whole_run(folder: Path, changes: dict[str, dict[str, Any]]) -> TrainingResult:
    """The only epoch of a run on eight training and four held-out pairs of text, all the way from files."""
    AcceleratorState._reset_state(True)
    folder.mkdir()
    for name, count, verb in (("train", 8, "cook"), ("eval", 4, "find")):
        rows = [
            {"prompt": f"How do I {verb} {n} birds?", "chosen": f"Ask {n} people.", "rejected": f"Wait {n} minutes."}
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    data = {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "max_length": 200}
    values = tiny_run.recipe(train={"max_steps": 2}).model_dump(exclude_none=True) | {"data": data}
    for table, keys in changes.items():
        values[table] = {**values[table], **keys}
    what = Recipe.model_validate(values)
    with RunLog(folder, 2) as tracker:
        return train_prepared(prepare_data(what), tiny_run.CPU, tracker, RunOptions(), RunHooks(), None)
