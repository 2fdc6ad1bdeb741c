"""Real dialogues through a trained model: packed rows against stock TRL on the same pairs, where ../shared is there."""

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from qlora_dpo.data.encoded import EncodedPair, digest_ids
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.packed import attention
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.objective import compute_losses
from qlora_dpo.preference.pack import Packing, collate, micro_batches
from qlora_dpo.preference.reference import batch_reference_logps
from qlora_dpo.recipe.objective import Sigmoid

SHARED = Path(__file__).parents[3] / "shared"
MODEL, ROWS = SHARED / "models" / "stories260k", SHARED / "data" / "hh" / "full-hh-style.jsonl.gz"

pytestmark = [
    tiny_run.LIBRARIES_WARN,
    pytest.mark.skipif(not (MODEL.is_dir() and ROWS.is_file()), reason="real rows are not beside this checkout"),
]


def real_pairs(tokenizer: Any, count: int) -> list[EncodedPair]:
    """HH rows of at most 500 tokens, prompt and answers tokenized one after the other."""
    pairs = []
    with gzip.open(ROWS, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(islice(lines, 200), 1):
            row = json.loads(line)
            prompt = tuple(tokenizer(row["prompt"]).input_ids)
            chosen, rejected = (
                (*tokenizer(row[name], add_special_tokens=False).input_ids, tokenizer.eos_token_id)
                for name in ("chosen", "rejected")
            )
            if len(prompt) + max(len(chosen), len(rejected)) <= 500 and chosen != rejected:
                pairs.append(EncodedPair(prompt, chosen, rejected, number, digest_ids(prompt, chosen, rejected)))
            if len(pairs) == count:
                break
    return pairs


@pytest.mark.filterwarnings("ignore:.*not a prefix.*")
@pytest.mark.parametrize("budget", [600, pytest.param(4096, marks=pytest.mark.slow)])
def test_loss_and_gradients_of_real_rows_are_trls(budget: int, tmp_path: Path) -> None:
    AcceleratorState._reset_state(True)
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pairs = real_pairs(tokenizer, 16)
    assert len(pairs) == 16
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    attention.enable_packed_attention(base)
    torch.manual_seed(0)
    trainer: Any = DPOTrainer(
        model=base,
        args=DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none", max_length=None),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )
    model = tiny_run.stirred(trainer.model)
    rows = [
        {"prompt_ids": list(p.prompt), "chosen_ids": list(p.chosen), "rejected_ids": list(p.rejected)} for p in pairs
    ]
    loss = trainer.compute_loss(model, trainer.data_collator(rows))
    loss.backward()
    expected = tiny_run.gradients(model)
    model.zero_grad()

    fuse_lora(model, torch.float32)
    packing, total = Packing(budget, tiny_run.PAD, "spans"), 0.0
    for group in micro_batches(pairs, packing):
        batch = collate([pairs[i] for i in group], packing)
        reference_P2 = batch_reference_logps(model, batch, tiny_run.CPU)
        scores = score_batch(model, batch, tiny_run.CPU)
        ours = compute_losses(scores.with_reference(reference_P2), Sigmoid()).total_P.sum() / len(pairs)
        ours.backward()
        total += ours.item()
    assert total == pytest.approx(loss.item(), rel=1e-5)
    assert abs(total - 0.693147) > 1e-3  # the adapter does something
    assert tiny_run.apart(tiny_run.gradients(model), expected) < 1e-5
