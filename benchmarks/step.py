"""One optimizer step of ours against TRL's: the same pairs, model, LoRA and dtype, in turn in one process.

    python benchmarks/step.py --data HH.jsonl.gz                            # SmolLM2-135M, 4-bit, 16 pairs, fp32
    python benchmarks/step.py --data HH.jsonl.gz --model FOLDER --batch 4 --quantization none --dtype bf16

Every round runs each variant once; medians of the rounds are compared, after one that only warms up. `trl-4` and
`trl-1` are DPOTrainer with its defaults at that micro-batch; `trl-best` is it without checkpointing, with a precomputed
reference, sorted by length, at the micro-batch given with --best; `trl-compact` is that with the head on scored tokens
only, which TRL has for Triton devices alone and is switched on here by hand. Ours come one trick after another.

`--memory` runs one step of each variant in a process of its own and compares how far memory rises above what the
loaded model takes.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flops
import torch

from qlora_dpo.cli.startup.quiet import quiet_libraries
from qlora_dpo.data.encode import load_pairs
from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model import device
from qlora_dpo.model.base import load_base
from qlora_dpo.model.decoder_layers import checkpointable_layers, set_gradient_checkpointing
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import attach_lora, trainable_parameters
from qlora_dpo.model.malloc import malloc_retain
from qlora_dpo.model.memory import USABLE_FRACTION, dense_bytes, free_bytes
from qlora_dpo.model.packed import attention
from qlora_dpo.model.quantized import cache_dequantized
from qlora_dpo.model.sources import ModelSource, fetch_model
from qlora_dpo.model.tokenizer import load_tokenizer
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.objective import compute_losses
from qlora_dpo.preference.pack import Packing, collate, max_sequence_tokens, micro_batches
from qlora_dpo.preference.reference import batch_reference_logps, model_logps
from qlora_dpo.recipe import recipe
from qlora_dpo.recipe.data import DataTable
from qlora_dpo.recipe.model import LoraTable, ModelTable
from qlora_dpo.recipe.objective import Sigmoid

TRL = ("trl-4", "trl-1", "trl-best", "trl-compact")
OURS = ("padded", "packed", "lean", "cached", "checkpointed")
NOTES = {
    "trl-4": "TRL's defaults, micro-batch 4",
    "trl-1": "TRL's defaults, micro-batch 1",
    "trl-best": "TRL without checkpointing, reference precomputed, sorted by length",
    "trl-compact": "the same, head on scored tokens only (switched on by hand)",
    "padded": "ours, padded batches, PEFT's layers, reference asked along",
    "packed": "+ packed rows, each prompt once",
    "lean": "+ lean LoRA layers, weights dequantized once: as shipped, first epoch",
    "cached": "+ reference from the cache: as shipped, a second run or epoch",
    "checkpointed": "the same with every layer recomputed",
}


@dataclass
class Bench:
    """What all variants share."""

    source: ModelSource
    table: ModelTable
    here: device.Device
    tokenizer: Any
    pairs: Sequence[EncodedPair]
    best: int
    budget: int
    pad: int


def main() -> None:
    """Measure and print."""
    quiet_libraries()
    asked = _arguments()
    bench = _bench(asked)
    names = asked.only.split(",") if asked.only else [*TRL, *OURS]
    if asked.memory:
        _memory(names)
        return
    steps = steps_of(bench, names)
    if asked.peak:
        if bench.here.type == "cpu":
            malloc_retain(retain=names[0] in OURS)
        before = _resident()
        steps[names[0]]()
        print(json.dumps({"loaded": before, "peak": peak(bench.here)}))
        return
    warm_up = 0 if asked.cold else 1
    seconds = timed(bench, steps, asked.rounds + warm_up)
    report(bench, {name: taken[warm_up:] for name, taken in seconds.items()}, asked.max_length)


def timed(bench: Bench, steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Run every variant once a round, in turn; seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name, step in steps.items():
            if bench.here.type == "cpu":
                malloc_retain(retain=name in OURS)  # ours sets this when it trains, nobody else does
            started = time.perf_counter()
            step()
            wait(bench.here)
            seconds[name].append(time.perf_counter() - started)
            print(f"round {turn} {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return seconds


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="preference pairs")
    parser.add_argument("--model", help="a model folder; absent: the quickstart's SmolLM2-135M")
    parser.add_argument("--quantization", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--batch", type=int, default=16, help="pairs per optimizer step")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="count the first round too, where a step takes minutes")
    parser.add_argument("--best", type=int, default=1, help="micro-batch of trl-best and trl-compact")
    parser.add_argument("--row", type=int, default=recipe.TrainTable().row_tokens, help="tokens of a row")
    parser.add_argument("--only", help="variants, separated by commas")
    parser.add_argument("--memory", action="store_true", help="compare peak memory instead of time")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _bench(asked: argparse.Namespace) -> Bench:
    quickstart = recipe.load_recipe("recipes/quickstart.toml").recipe.model
    table = ModelTable(name=asked.model) if asked.model else quickstart
    table = table.model_copy(update={"quantization": asked.quantization})
    source, here = fetch_model(table), device.select_device(asked.dtype)
    tokenizer: Any = load_tokenizer(source)
    data = DataTable(train=asked.data, eval="unused.jsonl", max_length=asked.max_length, max_train_samples=asked.batch)
    pairs = load_pairs(data, "train", tokenizer, seed=0).encoded
    return Bench(source, table, here, tokenizer, pairs, asked.best, asked.row, int(tokenizer.pad_token_id))


def steps_of(bench: Bench, names: Sequence[str]) -> dict[str, Callable[[], None]]:
    """For each variant a function that takes one optimizer step; models are loaded once and shared."""
    steps: dict[str, Callable[[], None]] = {}
    if {"trl-4", "trl-1"} & set(names):
        trainer = trainer_for(bench)
        steps |= {f"trl-{at_once}": lambda n=at_once: trl_step(trainer, bench, bench.pairs, n) for at_once in (4, 1)}
    if {"trl-best", "trl-compact"} & set(names):
        best = trainer_for(bench, gradient_checkpointing=False)
        best.precompute_ref_logps = True
        sorted_pairs = sorted(bench.pairs, key=max_sequence_tokens, reverse=True)
        reference_P2 = torch.zeros(len(sorted_pairs), 2)
        for name in ("trl-best", "trl-compact"):
            steps[name] = lambda compact=name == "trl-compact": trl_step(
                best, bench, sorted_pairs, bench.best, reference_P2, compact=compact
            )
    if {"padded", "packed"} & set(names):
        plain = model_for(bench, lean=False)
        steps["padded"] = lambda: our_step(plain, bench, Packing(bench.budget, bench.pad, None))
        steps["packed"] = lambda: our_step(plain, bench, Packing(bench.budget, bench.pad, bench.here.attention))
    if {"lean", "cached", "checkpointed"} & set(names):
        lean = model_for(bench, lean=True)
        packed = Packing(bench.budget, bench.pad, bench.here.attention)
        known_P2 = model_logps(lean[0].eval(), bench.pairs, packed, bench.here)
        layers = len(checkpointable_layers(lean[0]))
        steps["lean"] = lambda: our_step(lean, bench, packed)
        steps["cached"] = lambda: our_step(lean, bench, packed, known_P2)
        steps["checkpointed"] = lambda: our_step(lean, bench, packed, known_P2, recomputed=layers)
    return {name: steps[name] for name in names}


def trainer_for(bench: Bench, **changed: Any) -> Any:
    """Stock DPOTrainer over its own copy of the model, with its defaults but for `changed`."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    lora = LoraTable()
    trainer: Any = DPOTrainer(
        model=load_base(bench.source, bench.table, bench.here),
        args=DPOConfig(
            output_dir="unused",
            bf16=bench.here.compute_dtype == "bf16",
            fp16=bench.here.compute_dtype == "fp16",
            use_cpu=bench.here.type == "cpu",
            max_length=None,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **changed,
        ),
        # it insists on tokenizing something; the pairs are handed over as ids
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=bench.tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules
        ),
    )
    if (
        bench.here.needs_grad_scaler
    ):  # TRL has rounded a 4-bit model's adapter to bf16, which no loss scaler can unscale
        for parameter in trainable_parameters(trainer.model).values():
            parameter.data = parameter.data.float()
    trainer.create_optimizer()
    trainer.optimizer = trainer.accelerator.prepare_optimizer(trainer.optimizer)
    trainer.model.train()
    return trainer


def trl_step(
    trainer: Any,
    bench: Bench,
    pairs: Sequence[EncodedPair],
    at_once: int,
    reference_P2: torch.Tensor | None = None,
    *,
    compact: bool = False,
) -> None:
    """One optimizer step by the trainer's own `training_step`, optimizer included."""
    import trl.trainer.utils

    chosen = trl.trainer.utils._use_triton
    if compact:
        trl.trainer.utils._use_triton = lambda device: True
    trainer.current_gradient_accumulation_steps = len(pairs) // at_once
    for start in range(0, len(pairs), at_once):
        some = pairs[start : start + at_once]
        rows = [
            {"prompt_ids": list(p.prompt), "chosen_ids": list(p.chosen), "rejected_ids": list(p.rejected)} for p in some
        ]
        inputs = trainer.data_collator(rows)
        if reference_P2 is not None:
            known = reference_P2[start : start + at_once]
            inputs |= {"ref_chosen_logps": known[:, 0], "ref_rejected_logps": known[:, 1]}
        trainer.training_step(trainer.model, inputs, None)
    trainer.accelerator.clip_grad_norm_(list(trainable_parameters(trainer.model).values()), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trl.trainer.utils._use_triton = chosen


def model_for(bench: Bench, *, lean: bool, dense: bool = True) -> tuple[Any, Any, Any]:
    """Our model as a run prepares it, with its optimizer and loss scaler; without `lean` its layers are PEFT's.

    Lean ones keep `dense` weights where there is room, as a run does.
    """
    base = load_base(bench.source, bench.table, bench.here)
    if lean and dense and dense_bytes(base, bench.here.torch_dtype) <= free_bytes(bench.here) * USABLE_FRACTION / 2:
        cache_dequantized(base, bench.here.torch_dtype)
    attention.enable_packed_attention(base)
    model = attach_lora(base, LoraTable(), seed=0)
    if lean:
        fuse_lora(model, bench.here.torch_dtype)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-6)
    return model, optimizer, torch.amp.GradScaler(bench.here.type, enabled=bench.here.needs_grad_scaler)


def our_step(
    ours: tuple[Any, Any, Any],
    bench: Bench,
    packing: Packing,
    known_P2: torch.Tensor | None = None,
    *,
    recomputed: int = 0,
) -> None:
    """One optimizer step as the loop takes it; without `known_P2` the reference is asked along."""
    model, optimizer, scaler = ours
    model.train()
    set_gradient_checkpointing(model, recomputed)
    place = bench.here.torch_device
    for group in micro_batches(bench.pairs, packing):
        batch = collate([bench.pairs[i] for i in group], packing).to(place)
        reference_P2 = (
            batch_reference_logps(model, batch, bench.here) if known_P2 is None else known_P2[group].to(place)
        )
        scores = score_batch(model, batch, bench.here, metrics=False)  # wanted in logged steps only
        scaler.scale(
            compute_losses(scores.with_reference(reference_P2), Sigmoid()).total_P.sum() / len(bench.pairs)
        ).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(list(trainable_parameters(model).values()), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def report(bench: Bench, seconds: dict[str, list[float]], max_length: int) -> None:
    """The table: seconds, ratios to ours as shipped, work and the share of the machine's matmul rate."""
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    shipped = next((name for name in ("cached", "lean") if name in medians), next(iter(medians)))
    shape = flops.shape_of(bench.source.folder)
    rate = flops.matmul_rate(shape, bench.here)
    print(
        f"{bench.source.name}, {bench.table.quantization}, {bench.here.compute_dtype}, {len(bench.pairs)} pairs, "
        f"max_length {max_length}, {bench.here.name}, medians of {len(next(iter(seconds.values())))} rounds; "
        f"matmul rate {rate / 1e9:.0f} GFLOP/s"
    )
    print(
        f"| variant | s | s / {shipped}'s | tokens per pair | GFLOP per pair | MFU | |\n|---|---|---|---|---|---|---|"
    )
    for name, median in medians.items():
        tokens, work = _work(bench, name, shape)
        print(
            f"| {name} | {median:.2f} | {median / medians[shipped]:.2f} | {tokens:.0f} | {work / 1e9:.0f} | "
            f"{work * len(bench.pairs) / median / rate:.0%} | {NOTES[name]} |"
        )


def _work(bench: Bench, name: str, shape: flops.Shape) -> tuple[float, float]:
    """Tokens that are computed for a pair in one pass, and floating-point operations of a step for a pair."""
    count = len(bench.pairs)
    if name in TRL:
        defaults = name in ("trl-4", "trl-1")
        at_once = {"trl-4": 4, "trl-1": 1}.get(name, bench.best)
        pairs = bench.pairs if defaults else sorted(bench.pairs, key=max_sequence_tokens, reverse=True)
        groups = [pairs[start : start + at_once] for start in range(0, count, at_once)]
        total = sum(
            flops.padded(shape, group, recomputed=defaults, reference=defaults, compact=name == "trl-compact")
            for group in groups
        )
        return sum(2 * len(group) * max(map(max_sequence_tokens, group)) for group in groups) / count, total / count
    packing = Packing(bench.budget, bench.pad, None if name == "padded" else bench.here.attention)
    batches = [collate([bench.pairs[i] for i in group], packing) for group in micro_batches(bench.pairs, packing)]
    reference = name not in ("cached", "checkpointed")
    total = sum(flops.ours(shape, batch, recomputed=name == "checkpointed", reference=reference) for batch in batches)
    return sum(batch.input_ids_BL.numel() for batch in batches) / count, total / count


def _memory(names: Sequence[str]) -> None:
    """One step of each variant in a process of its own."""
    command = [argument for argument in sys.argv if argument != "--memory"]
    print("| variant | loaded, GiB | peak, GiB | above the loaded model, GiB | |\n|---|---|---|---|---|")
    for name in names:
        done = subprocess.run(
            [sys.executable, *command, "--only", name, "--peak"], check=True, stdout=subprocess.PIPE, text=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        loaded, peak = (found[key] / 2**30 for key in ("loaded", "peak"))
        print(f"| {name} | {loaded:.2f} | {peak:.2f} | {peak - loaded:.2f} | {NOTES[name]} |", flush=True)


def _resident() -> int:
    """Bytes that this process holds, or that lie on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak(here: device.Device) -> int:
    if here.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def wait(here: device.Device) -> None:
    if here.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
