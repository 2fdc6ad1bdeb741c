"""Each answer of the reference is kept as soon as it is there: a kill costs the batch in flight; damage is left out."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from fork_server import run_forked

from qlora_dpo.data.encoded import pair_digests
from qlora_dpo.errors import SourceError
from qlora_dpo.preference import logp_journal, reference, reference_cache
from qlora_dpo.preference.logp_journal import (
    RECORD_DTYPE,
    LogpJournal,
    decode_records,
    encode_records,
    orphaned_journals,
)
from qlora_dpo.preference.logp_table import EMPTY_LOGP_TABLE, make_logp_table
from qlora_dpo.preference.reference import compute_reference_logps
from qlora_dpo.preference.reference_cache import ReferenceLogpCache, read_logp_table

pytestmark = tiny_run.LIBRARIES_WARN

PAIRS = tiny_run.pairs(9)
DIGESTS = pair_digests(PAIRS)
LOGPS = np.arange(18, dtype=np.float32).reshape(9, 2)
CONTENT = encode_records(DIGESTS, LOGPS)

DIES_AFTER_TWO_BATCHES = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import tiny_run
from qlora_dpo.preference.reference import compute_reference_logps
from qlora_dpo.preference.reference_cache import ReferenceLogpCache
done = []
def advance(pairs):
    done.append(pairs)
    if len(done) == 3:  # the first tells how many are known
        os.kill(os.getpid(), signal.SIGKILL)
rows = replace(tiny_run.PACKED, token_budget=64)
cache = ReferenceLogpCache(Path(sys.argv[1]))
compute_reference_logps(tiny_run.base_model(), tiny_run.pairs(9), cache, rows, tiny_run.CPU, advance)
"""


def test_answers_are_found_by_digest_and_the_newer_ones_win() -> None:
    some = make_logp_table(DIGESTS[:4][::-1], LOGPS[:4][::-1])
    assert list(some.digest_P) == sorted(some.digest_P)
    found = some.lookup(DIGESTS)
    assert np.array_equal(found[:4], LOGPS[:4])
    assert np.isnan(found[4:]).all()
    both = some.merged_with(make_logp_table(DIGESTS[3:6], LOGPS[3:6] + 100))
    assert np.array_equal(both.lookup(DIGESTS[:6]), np.concatenate([LOGPS[:3], LOGPS[3:6] + 100]))
    assert len(both) == 6
    assert np.array_equal(make_logp_table(DIGESTS[[1, 1]], LOGPS[:2]).lookup(DIGESTS[[1]]), LOGPS[[1]])
    assert np.isnan(EMPTY_LOGP_TABLE.lookup(DIGESTS)).all()


def test_digests_that_end_in_zeros_are_told_apart() -> None:
    two = np.array([b"\1" + bytes(31), b"\1" + bytes(30) + b"\1"], dtype="S32")
    assert np.array_equal(make_logp_table(two, LOGPS[:2]).lookup(two[::-1]), LOGPS[:2][::-1])


@pytest.mark.parametrize("bytes_left", range(2 * RECORD_DTYPE.itemsize, 3 * RECORD_DTYPE.itemsize))
def test_a_record_that_was_cut_off_is_left_out(bytes_left: int) -> None:
    assert set(decode_records(CONTENT[:bytes_left]).digest_P) == set(DIGESTS[:2])


@pytest.mark.parametrize("byte", range(RECORD_DTYPE.itemsize))
def test_a_record_with_a_flipped_bit_is_left_out_and_no_other(byte: int) -> None:
    at = 3 * RECORD_DTYPE.itemsize + byte
    found = decode_records(CONTENT[:at] + bytes([CONTENT[at] ^ 4]) + CONTENT[at + 1 :])
    assert set(found.digest_P) == set(DIGESTS) - {DIGESTS[3]}


def test_zeros_are_no_record() -> None:
    assert len(decode_records(bytes(4 * RECORD_DTYPE.itemsize))) == 0


def test_a_journal_whose_process_lives_is_left_alone(tmp_path: Path) -> None:
    own = LogpJournal(tmp_path)
    own.add(DIGESTS, LOGPS)
    with orphaned_journals(tmp_path) as found:
        assert found == {}
    own.close()
    assert list(tmp_path.iterdir()) == []


def test_after_a_save_the_journal_starts_anew(tmp_path: Path) -> None:
    store = ReferenceLogpCache(tmp_path)
    store.add(PAIRS[:2], torch.from_numpy(LOGPS[:2]))
    path = store.journal.path
    assert path is not None
    assert path.stat().st_size == 2 * RECORD_DTYPE.itemsize
    store.save()
    assert path.stat().st_size == 0
    store.add(PAIRS[2:3], torch.from_numpy(LOGPS[2:3]))
    assert set(decode_records(path.read_bytes()).digest_P) == {DIGESTS[2]}
    assert path.stat().st_size == RECORD_DTYPE.itemsize
    with store:
        pass
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"] * 2
    assert np.array_equal(read_logp_table(tmp_path).lookup(DIGESTS[:3]), LOGPS[:3])


def test_killed_in_its_pass_a_run_computes_no_pair_again(tmp_path: Path) -> None:
    whole = compute_reference_logps(
        tiny_run.base_model(),
        PAIRS,
        ReferenceLogpCache(tmp_path / "whole"),
        replace(tiny_run.PACKED, token_budget=64),
        tiny_run.CPU,
    )
    folder = tmp_path / "killed"
    here = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "helpers")]),
    }
    done = run_forked(["-c", DIES_AFTER_TWO_BATCHES, str(folder)], cwd=tmp_path, env=here)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = folder.iterdir()
    before = set(decode_records(left.read_bytes()).digest_P)
    assert 0 < len(before) < len(PAIRS)
    left.write_bytes(left.read_bytes() + CONTENT[:11])  # a record that was in flight
    store, asked = ReferenceLogpCache(folder), list[Any]()
    add = store.add
    store.add = lambda pairs, logps: asked.extend(pairs) or add(pairs, logps)  # type: ignore[method-assign,func-returns-value]
    again = compute_reference_logps(
        tiny_run.base_model(), PAIRS, store, replace(tiny_run.PACKED, token_budget=64), tiny_run.CPU
    )
    assert {pair.digest for pair in asked} == {pair.digest for pair in PAIRS} - before
    assert len(asked) == store.local_computed == len(PAIRS) - len(before)
    torch.testing.assert_close(again, whole, rtol=1e-5, atol=1e-5)
    assert {file.suffix for file in folder.iterdir()} == {".safetensors"}


def test_without_room_for_what_was_left_it_stays_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"left{logp_journal.JOURNAL_SUFFIX}").write_bytes(CONTENT)

    def full(*some: Any) -> None:
        raise SourceError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(reference_cache, "atomic_write", full)
        assert len(ReferenceLogpCache(tmp_path).known) == 0
    assert (tmp_path / f"left{logp_journal.JOURNAL_SUFFIX}").is_file()
    assert len(ReferenceLogpCache(tmp_path).known) == len(PAIRS)


def test_pairs_are_grouped_a_few_thousand_at_a_time_and_each_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "GROUPING_BLOCK", 2)
    whole = compute_reference_logps(
        tiny_run.base_model(), PAIRS, ReferenceLogpCache(tmp_path / "one"), tiny_run.PACKED, tiny_run.CPU
    )
    store, twice = ReferenceLogpCache(tmp_path / "two"), [*PAIRS, *PAIRS[:4]]
    found = compute_reference_logps(tiny_run.base_model(), twice, store, tiny_run.PACKED, tiny_run.CPU)
    assert store.local_computed == len(PAIRS)
    torch.testing.assert_close(found, torch.cat([whole, whole[:4]]), rtol=1e-5, atol=1e-5)
