"""The plan for 10 million pairs: its formulas against worked numbers, and its bytes against what is really written."""

import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from documents import ROOT

from qlora_dpo.model.lora import trainable_parameters
from qlora_dpo.preference.logp_journal import RECORD_DTYPE
from qlora_dpo.preference.logp_table import make_logp_table
from qlora_dpo.preference.reference_cache import write_logp_table

sys.path.insert(0, str(ROOT / "docs"))

import scale_plan as plan


def test_an_adapter_has_as_many_parameters_as_peft_makes() -> None:
    tiny = plan.Model("tiny", 0, layers=2, width=64, inner=128, key_width=32)
    assert tiny.lora_parameters(4) == sum(
        each.numel() for each in trainable_parameters(tiny_run.fresh(tiny_run.recipe())).values()
    )
    # 24 * 16 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864))
    assert plan.QWEN_05B.lora_parameters(16) == 8_798_208


def test_operations_are_two_a_weight_and_token_in_each_of_three_passes() -> None:
    assert plan.operations(plan.QWEN_05B) == pytest.approx(6 * 494e6 * 271)
    # benchmarks/README.md, "A step against TRL's": 516 GFLOP at 198 tokens a pair, with the head on answer tokens only
    assert plan.operations(plan.QWEN_05B, tokens=198) == pytest.approx(516e9, rel=0.2)


def test_an_epoch_is_computed_in_its_operations_over_what_the_gpus_do() -> None:
    # 1e7 * 8.032e11 / (64 * 989e12 * 0.35) = 362.6
    assert plan.compute_seconds(plan.QWEN_05B) == pytest.approx(362.6, abs=0.1)
    assert plan.steps() == 9766
    # 9766 * 2 * 63 / 64 * 4 * 8798208 / 50e9 = 13.53
    assert plan.sync_seconds(plan.QWEN_05B) == pytest.approx(13.53, abs=0.01)
    # 156,250 pairs a GPU
    assert plan.host_seconds() == pytest.approx(156_250 * plan.MEASURED.host_seconds)
    parts = plan.compute_seconds(plan.LLAMA_8B) + plan.host_seconds() + plan.sync_seconds(plan.LLAMA_8B)
    assert plan.epoch_seconds(plan.LLAMA_8B) == pytest.approx(parts)


def test_a_checkpoint_is_three_float32_of_each_parameter() -> None:
    assert plan.checkpoint_bytes(plan.QWEN_05B) == 105_578_496


def test_answers_and_records_take_the_bytes_that_are_stated(tmp_path: Path) -> None:
    digests = np.arange(8000, dtype=np.uint32).view("S32")
    write_logp_table(tmp_path, make_logp_table(digests, np.zeros((1000, 2))))
    (file,) = tmp_path.iterdir()
    assert 0 <= file.stat().st_size - 1000 * plan.ANSWER_BYTES < 300  # the header
    assert RECORD_DTYPE.itemsize == plan.RECORD_BYTES


def test_a_kill_costs_half_of_what_lies_between_two_checkpoints() -> None:
    assert plan.lost_seconds(plan.LLAMA_8B) == pytest.approx(900)
    assert plan.lost_seconds(plan.QWEN_05B) == pytest.approx(min(900, plan.epoch_seconds(plan.QWEN_05B) / 2))


def test_reading_is_shared_out_and_a_warm_start_is_not() -> None:
    assert plan.cold_reading_seconds() == pytest.approx(1e7 * plan.MEASURED.read_seconds)
    assert plan.cold_reading_seconds(64) == pytest.approx(plan.cold_reading_seconds() / 64)
    assert plan.warm_start_seconds() == pytest.approx(plan.MEASURED.start_seconds + 1e7 * plan.MEASURED.warm_seconds)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(59.6, "60 s"), (89.9, "90 s"), (90, "1.5 min"), (5399, "90.0 min"), (5400, "1.5 h")]
)
def test_seconds_are_shown_in_the_unit_they_are_read_in(seconds: float, shown: str) -> None:
    assert plan.shown_seconds(seconds) == shown


@pytest.mark.parametrize(("size", "shown"), [(1.5e6, "1.5 MB"), (999e6, "999.0 MB"), (16e9, "16.0 GB")])
def test_bytes_are_shown_as_mb_or_gb(size: float, shown: str) -> None:
    assert plan.shown_bytes(size) == shown
