"""How long a run takes, planned: counts of passes, the pace of one layer, and what `check` makes of both."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch
from transformers import Qwen2Config

from qlora_dpo.cli import main
from qlora_dpo.cli.text import time_text
from qlora_dpo.planning import layer_timing
from qlora_dpo.planning.layer_timing import LayerTiming, measure_layer_timing
from qlora_dpo.planning.time_estimate import (
    LayerCounts,
    PassCounts,
    TimeEstimate,
    TokensPerPair,
    count_passes,
    estimate_seconds,
    mean_tokens_per_pair,
)
from qlora_dpo.preference.pack import Packing

pytestmark = tiny_run.LIBRARIES_WARN

PACE = LayerTiming(layer_forward=1.0, layer_step=10.0, head_forward=100.0, head_step=1000.0, probe_seconds=2.0)


def counted(pairs: int, heldout: int, several_rows: bool = False, **tables: dict[str, Any]) -> PassCounts:
    return count_passes(tiny_run.recipe(**tables), pairs, heldout, multiple_rows=several_rows)


def test_every_pair_is_counted_as_often_as_a_run_asks_it() -> None:
    # batches of 4: 10 pairs are 3 steps an epoch; evaluations at 0 and 3, of 6 pairs and twice more for the KL
    plain = PassCounts(
        steps=3,
        evaluations=2,
        trained_pairs=10,
        extra_forward_pairs=0,
        reference_train_pairs=10,
        reference_heldout_pairs=6,
        evaluated_pairs=2 * (6 + 12),
    )
    assert counted(10, 6) == plain
    # four epochs ask the reference no more often
    assert counted(10, 6, train={"num_train_epochs": 4}) == replace(
        plain, steps=12, evaluations=5, trained_pairs=40, evaluated_pairs=5 * 18
    )
    # at 0, 2, 4, 6, 8 and the last, 9; the KL is measured on 32 pairs at most
    assert counted(10, 50, train={"num_train_epochs": 3, "eval_steps": 2}) == replace(
        plain, steps=9, evaluations=6, trained_pairs=30, reference_heldout_pairs=50, evaluated_pairs=6 * (50 + 64)
    )
    # stopped in the middle of an epoch: no other pair is seen
    assert counted(10, 6, train={"max_steps": 2}) == replace(plain, steps=2, trained_pairs=8, reference_train_pairs=8)
    assert counted(10, 6, train={"max_steps": 5, "num_train_epochs": 2}) == replace(
        plain, steps=5, evaluations=3, trained_pairs=18, evaluated_pairs=3 * 18
    )


def test_references_are_counted_by_their_kind() -> None:
    free = counted(10, 6, objective={"loss_type": "simpo"})
    assert (free.reference_train_pairs, free.reference_heldout_pairs, free.uses_reference_model) == (0, 0, False)
    moves = counted(10, 6, reference={"kind": "ema", "ref_model_sync_steps": 1}, train={"num_train_epochs": 2})
    assert (moves.reference_train_pairs, moves.reference_heldout_pairs) == (20, 6 * 3)
    other = counted(10, 6, reference={"kind": "model", "name": "another"})
    assert (other.reference_train_pairs, other.reference_heldout_pairs, other.uses_reference_model) == (10, 6, True)


def test_losses_that_look_at_a_whole_step_ask_twice_if_it_takes_several_rows() -> None:
    aot = {"objective": {"loss_type": "aot"}}
    assert [counted(10, 6, rows, **aot).extra_forward_pairs for rows in (False, True)] == [0, 10]
    assert counted(10, 6, several_rows=True).extra_forward_pairs == 0


def test_seconds_add_up() -> None:
    done = PassCounts(
        steps=3,
        evaluations=2,
        trained_pairs=10,
        extra_forward_pairs=0,
        reference_train_pairs=10,
        reference_heldout_pairs=6,
        evaluated_pairs=36,
    )
    train, heldout = TokensPerPair(tokens=7, states=5), TokensPerPair(tokens=2, states=1)
    # a forward pass: 4 layers of 7 tokens and 5 states, 528 s; of a held-out pair 108 s; a step 40 * 7 + 5000
    plain = {"reference": 10 * 528.0 + 6 * 108.0, "steps": 10 * 5280.0, "evaluations": 36 * 108.0}
    assert estimate_seconds(done, PACE, LayerCounts(4), train, heldout) == plain
    # 3 layers recomputed: 3 forward passes more
    assert estimate_seconds(done, PACE, LayerCounts(4, 3), train, heldout) == {**plain, "steps": 10 * (5280.0 + 3 * 7)}
    # the adapter begins at layer 2: two layers go forward only, and of those recomputed one is left
    assert estimate_seconds(done, PACE, LayerCounts(4, 3, 2), train, heldout)["steps"] == 10 * (
        (2 * 10 + 3) * 7 + 5000.0
    )
    assert estimate_seconds(replace(done, extra_forward_pairs=10), PACE, LayerCounts(4), train, heldout)[
        "steps"
    ] == 10 * (5280.0 + 528.0)
    without = estimate_seconds(
        replace(done, reference_train_pairs=0, reference_heldout_pairs=0), PACE, LayerCounts(4), train, heldout
    )
    assert without == {"steps": plain["steps"], "evaluations": plain["evaluations"]}
    assert estimate_seconds(replace(done, uses_reference_model=True), PACE, LayerCounts(4), train, heldout) == without


def test_a_pair_is_as_much_less_as_those_that_are_laid_out() -> None:
    one, other = tiny_run.pairs(2)
    same = replace(one, chosen=(*one.prompt, 5, 6), rejected=(*one.prompt, 7, 8))
    # prompt, then the prompt again in both answers, and twice two tokens of their own; the other pair is the same
    n = len(one.prompt)
    found = mean_tokens_per_pair([same, same], [same], tiny_run.PACKED)
    assert found == TokensPerPair(tokens=2 * n + 4, states=pytest.approx(n + 3))
    # unlike pairs have nothing in common but, at most, their first tokens
    assert mean_tokens_per_pair([one], [one], tiny_run.PADDED).tokens == 2 * (
        n + max(len(one.chosen), len(one.rejected)) + 1
    )
    assert mean_tokens_per_pair([other] * 3, [other], tiny_run.PACKED) == mean_tokens_per_pair(
        [other], [other], tiny_run.PACKED
    )


@pytest.mark.parametrize(
    ("quantization", "dense", "dtype", "packing"),
    [
        ("none", False, "fp32", tiny_run.PACKED),
        ("nf4", True, "fp32", tiny_run.PADDED),
        ("nf4", False, "bf16", tiny_run.PACKED),
        ("int8", False, "fp32", tiny_run.PACKED),
    ],
)
def test_one_layer_of_a_tiny_model_has_a_pace(
    quantization: str, dense: bool, dtype: Any, packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_timing, "MIN_TIMING_SECONDS", 0.02)
    what = tiny_run.recipe(quantization, lora={"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]})
    place = tiny_run.device.select_device(dtype)
    found = measure_layer_timing(tiny_run.source(), what, place, tiny_run.pairs(8), packing, dense=dense)
    for name, each in vars(found).items():
        assert 0 < each < math.inf or (name == "other_load" and each == 0)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_the_probe_stores_its_layer_as_a_run_does(quantization: str) -> None:
    model, words = layer_timing._build_one_layer_model(
        tiny_run.source(), tiny_run.recipe(quantization), tiny_run.CPU, tiny_run.PACKED, dense=False
    )
    loaded = tiny_run.load_base(tiny_run.source(), tiny_run.recipe(quantization).model, tiny_run.CPU)
    probed, real = (each.get_base_model() if each is model else each for each in (model, loaded))
    layers = [each.model.layers[0].mlp.up_proj for each in (probed, real)]
    stored, own = (getattr(each, "base_layer", each) for each in layers)
    assert type(stored) is type(own) and words == 1
    assert (stored.weight.dtype, stored.weight.shape) == (own.weight.dtype, own.weight.shape)
    assert len(probed.model.layers) == 1


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (0.04, "0.1 s"),
        (1.64, "1.6 s"),
        (9.5, "10 s"),
        (42.3, "42 s"),
        (119, "119 s"),
        (121, "2 min"),
        (3540, "59 min"),
        (3599, "1 h"),
        (4200, "1 h 10 min"),
        (86400 * 2 + 3600 * 3, "2 d 3 h"),
        (86399, "1 d"),
    ],
)
def test_durations_have_two_units_at_most(told: float, expected: str) -> None:
    assert time_text.format_duration(told) == expected


def test_the_line_tells_the_whole_and_its_parts() -> None:
    done = PassCounts(
        steps=250,
        evaluations=5,
        trained_pairs=1,
        extra_forward_pairs=0,
        reference_train_pairs=1,
        reference_heldout_pairs=1,
        evaluated_pairs=5,
    )
    parts = {"reference": 180.0, "steps": 3600.0, "evaluations": 420.0}
    assert time_text.time_estimate_line(TimeEstimate(done, parts, 2.0)) == (
        "about 1 h 10 min: reference 3 min unless cached, 250 steps 1 h, 5 evaluations 7 min (probe of 2.0 s "
        "on this machine)"
    )
    del parts["reference"]
    assert time_text.time_estimate_line(
        TimeEstimate(replace(done, steps=1, uses_reference_model=True), parts, 2.0)
    ) == (
        "about 1 h 7 min: 1 step 1 h, 5 evaluations 7 min, and the reference, which is another model (probe of 2.0 s "
        "on this machine)"
    )


def test_a_busy_machine_is_told() -> None:
    counts = count_passes(tiny_run.recipe(), 10, 6, multiple_rows=False)
    line = time_text.time_estimate_line(TimeEstimate(counts, {"steps": 60.0}, 2.0, other_load=1.25))
    cores = f"other programs keep 1.2 of {os.cpu_count()} cores busy, beside which it takes longer"
    assert line.endswith(f"(probe of 2.0 s on this machine; {cores})")


@pytest.mark.parametrize(("other_cores", "expected"), [(0.0, 0.02), (1.0, 0.004)])
def test_beside_other_programs_the_cpu_seconds_of_one_thread_count(
    other_cores: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_timing.CpuLoad, "other_cores", lambda load: other_cores)
    monkeypatch.setattr(layer_timing, "cpu_seconds", lambda fn: 0.008)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    seconds = layer_timing._seconds(lambda: time.sleep(0.02), tiny_run.CPU)
    assert seconds == expected if other_cores else seconds >= expected


def test_cpu_seconds_are_those_of_one_thread_and_leave_the_others() -> None:
    threads, seen = torch.get_num_threads(), list[int]()
    torch.set_num_threads(2)
    try:
        assert layer_timing.cpu_seconds(lambda: seen.append(torch.get_num_threads())) < 1
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core cannot be shared and idle")
def test_a_probe_beside_a_program_that_keeps_every_core_busy_is_within_half_of_an_idle_one() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(1024, 1024, generator=generator) for _ in range(2))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)

    def probe() -> float:
        def products() -> None:
            for _ in range(10):
                left @ right

        return layer_timing._seconds(products, tiny_run.CPU)

    spinners = list[subprocess.Popen[bytes]]()
    try:
        idle = probe()
        spinners += [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
        time.sleep(1)
        assert 1 / 1.5 < probe() / idle < 1.5
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
        torch.set_num_threads(threads)


@pytest.fixture
def place(empty_folder: Path) -> Path:
    """Data of 20 and 12 pairs, and a recipe for a tiny model that has no weights."""
    for name, numbers in (("train", range(20)), ("held", range(20, 32))):
        rows = [{"prompt": f"Is {n} even?", "chosen": f"No, {n}.", "rejected": f"Eh, {n}!"} for n in numbers]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = Qwen2Config(vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    config.save_pretrained("base")
    tiny.tokenizer().save_pretrained("base")
    Path("r.toml").write_text(
        '[model]\nname = "./base"\ndtype = "fp32"\n[lora]\nr = 4\n[data]\ntrain = "./train.jsonl"\n'
        'eval = "./held.jsonl"\n[train]\nbatch_size = 4\n',
        encoding="utf-8",
    )
    return empty_folder


def time_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["check", "r.toml", *arguments]) == 0
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("time "))


def test_check_tells_the_time_of_a_run_on_this_machine(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = time_line(capsys)
    assert line.startswith("time      ok       about ") and " on this machine" in line
    for part in (": reference ", "5 steps ", "2 evaluations "):
        assert part in line
    assert main(["check", "r.toml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["time"]
    assert found["seconds"].keys() == {"reference", "steps", "evaluations"}
    assert found["total_seconds"] == pytest.approx(sum(found["seconds"].values()))
    assert all(0 < each < math.inf for each in (*found["seconds"].values(), found["probe_seconds"]))
    assert (found["why_not"], found["evaluations"]) == ("", 2)
    assert found["pairs"] == {"trained": 20, "reference": 32, "evaluated": 72}


def test_where_nothing_can_be_timed_check_says_why(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = "time               not known: "
    assert (
        time_line(capsys, "--gpu", "t4", "--set", "model.dtype=auto") == nothing + "measuring it needs the card itself"
    )
    # an adapter on the second layer only, which one layer alone does not have
    only = "--set", r"lora.target_modules='model\.layers\.1\.mlp\.up_proj'"
    assert time_line(capsys, *only).startswith(f"{nothing}one layer alone cannot be timed: lora.target_modules = ")
    assert main(["check", "r.toml", "--json", "--gpu", "t4", "--set", "model.dtype=auto"]) == 0
    found = json.loads(capsys.readouterr().out)["time"]
    assert (found["seconds"], found["total_seconds"], found["why_not"]) == (
        None,
        None,
        "measuring it needs the card itself",
    )
