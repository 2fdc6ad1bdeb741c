"""The end of `train`: samples of base and tuned model, results, report, and the next commands to type."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click
from peft import PeftModel
from rich.console import Console

from qlora_dpo.data.audit import length_baselines
from qlora_dpo.files import atomic_write, write_json
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.recipe import Recipe
from qlora_dpo.report.answer_counts import count_answers
from qlora_dpo.report.next_commands import format_next_commands
from qlora_dpo.report.samples import samples_view
from qlora_dpo.report.tables import answers_table, results_table
from qlora_dpo.report.write import write_report
from qlora_dpo.talk.generate import generate_greedy
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training.checkpoint.best import best_step
from qlora_dpo.training.context import SampleFn
from qlora_dpo.training.prepare import PreparedData, timed
from qlora_dpo.training.run import TrainingResult
from qlora_dpo.training.run_metadata import build_run_metadata, round_seconds

SampleRecords = list[dict[str, Any]]


def generate_samples(result: TrainingResult, recipe: Recipe, device: Device, run_log: RunLog) -> SampleRecords:
    """Completions by base and tuned model of the first held-out prompts, as samples.jsonl holds them."""
    pairs = result.prepared.heldout.pairs[: recipe.samples.prompts]
    prompts = [pair.prompt for pair in pairs]
    tokenizer, limit = result.prepared.tokenizer, recipe.samples.max_new_tokens
    with timed(result.seconds, "samples"), run_log.phase("answers", 2 * len(pairs)) as advance, device.autocast():
        tuned = generate_greedy(result.model, tokenizer, prompts, limit)
        advance(len(pairs))
        with adapter_disabled(result.model):
            base = generate_greedy(result.model, tokenizer, prompts, limit)
        advance(len(pairs))
    return [
        {
            "row": pair.row,
            "group": pair.extra.get(recipe.samples.group_by) if recipe.samples.group_by else None,
            "prompt": list(pair.prompt),
            "chosen": pair.chosen,
            "base": before.text,
            "tuned": after.text,
            "base_tokens": before.tokens,
            "tuned_tokens": after.tokens,
            "base_ended": before.ended,
            "tuned_ended": after.ended,
        }
        for pair, before, after in zip(pairs, base, tuned, strict=True)
    ]


def make_sample_fn(prepared: PreparedData, recipe: Recipe, device: Device) -> SampleFn | None:
    """Greedy completions of the first held-out prompts at an evaluation; None if the recipe wants none.

    Greedy decoding draws no random number, so training is the same with and without it.
    """
    count = recipe.samples.at_evaluations
    if count is None:
        return None
    pairs = prepared.heldout.pairs[:count]

    def sample(model: PeftModel) -> SampleRecords:
        with device.autocast():
            completions = generate_greedy(
                model, prepared.tokenizer, [pair.prompt for pair in pairs], recipe.samples.max_new_tokens
            )
        return [
            {
                "row": pair.row,
                "prompt": list(pair.prompt),
                "answer": completion.text,
                "tokens": completion.tokens,
                "ended": completion.ended,
            }
            for pair, completion in zip(pairs, completions, strict=True)
        ]

    return sample


def write_run_metadata(folder: Path, result: TrainingResult, recipe: Recipe, device: Device) -> dict[str, Any]:
    """Write run.json and return what it holds."""
    count = processes.world_size()
    several = ["--processes", str(count)] if count > 1 else []
    run = build_run_metadata(result, recipe, device, folder, shlex.join(["qlora-dpo", *sys.argv[1:], *several]))
    write_json(folder / "run.json", run)
    return run


def write_results(folder: Path, result: TrainingResult, samples: SampleRecords, recipe: Recipe) -> dict[str, Any]:
    """Write results.json, samples.jsonl and the report; returns what results.json holds."""
    results = results_record(result, samples, recipe)
    write_json(folder / "results.json", results)
    atomic_write(folder / "samples.jsonl", "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
    write_report(folder, result.prepared.source.folder)
    return results


def print_result(folder: Path, results: dict[str, Any], samples: SampleRecords, recipe: Recipe) -> None:
    """Show the result and what to type next on stdout."""
    console = Console()
    console.print(results_table(results))
    for sign in results["signs"]:
        console.print(f"step {sign['step']}: {sign['sentence']}", style="yellow", markup=False, highlight=False)
    if recipe.samples.group_by or recipe.samples.count_matching:
        console.print(answers_table(results["answers"], samples))
    console.print(samples_view(samples, recipe.samples.show))
    click.echo(format_next_commands(folder))


def results_record(result: TrainingResult, samples: SampleRecords, recipe: Recipe) -> dict[str, Any]:
    """What results.json holds; `best` is by the recipe's metric_for_best_model."""
    evals = result.state.evals
    return {
        "evals": evals,
        "first": evals[0]["step"],
        "best": best_step(evals, recipe.train.metric_for_best_model),
        "last": evals[-1]["step"],
        "baselines": length_baselines(result.prepared.heldout.encoded),
        "pairs": {"train": len(result.prepared.train.encoded), "eval": len(result.prepared.heldout.encoded)},
        "signs": result.state.signs,
        "answers": count_answers(samples, recipe.samples.count_matching),
        "seconds": round_seconds(result.seconds),
    }
