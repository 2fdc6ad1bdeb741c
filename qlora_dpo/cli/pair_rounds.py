"""Rounds of `pairs --rounds`: sample, score, train, and ask the trained model the same held-out prompts, again."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from qlora_dpo.adapter import OpenedModel
from qlora_dpo.cli.run_hooks import run_hooks
from qlora_dpo.files import write_json
from qlora_dpo.model.device import select_device
from qlora_dpo.model.memory import free_cached_memory
from qlora_dpo.on_policy.answers import SampledAnswer, recorded_answers
from qlora_dpo.on_policy.journal import Journal
from qlora_dpo.on_policy.make import PairsResult, answer_prompts, answers_path, scores_path
from qlora_dpo.on_policy.prompts import AskedPrompt
from qlora_dpo.on_policy.scores import Scorer
from qlora_dpo.recipe import load_recipe
from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME
from qlora_dpo.talk.sampling import SamplingParams
from qlora_dpo.training.checkpoint.save import has_valid_checkpoint
from qlora_dpo.training.run import RunOptions, run_training
from qlora_dpo.wilson import wilson_interval

HELD_OUT_SHARE, MAX_HELD_OUT = 0.2, 64
"""The share of the prompts that no round trains on, and how many these are at most."""
ROUNDS_FILE, RESULTS_FILE = "rounds.json", "results.json"


@dataclass(frozen=True)
class RoundResult:
    """A round's pairs, and its greedy answers to the held-out prompts against those of the start."""

    round: int
    pairs: int
    steps: int
    win_rate: float
    """Share of the held-out prompts whose answer has a higher score than the start's; a tie counts one half."""
    interval: tuple[float, float]
    mean_score: float
    """Of its held-out answers, if each is scored on its own; by a judge, the win rate."""
    mean_tokens: float


@dataclass(frozen=True)
class Rounds:
    """What all rounds have in common."""

    folder: Path
    recipe: str
    count: int
    scorer: Scorer
    open_model: Callable[[str], OpenedModel]
    make_pairs: Callable[[OpenedModel, Sequence[AskedPrompt], Path, SamplingParams], PairsResult]
    settings: SamplingParams


def split_prompts(asked: Sequence[AskedPrompt], seed: int) -> tuple[list[AskedPrompt], list[AskedPrompt]]:
    """The prompts that rounds sample from, and the held-out ones, drawn with `seed`."""
    count = min(MAX_HELD_OUT, max(1, round(HELD_OUT_SHARE * len(asked))))
    held_out = set(random.Random(seed).sample(range(len(asked)), count))  # noqa: S311 - nothing secret
    return (
        [prompt for index, prompt in enumerate(asked) if index not in held_out],
        [prompt for index, prompt in enumerate(asked) if index in held_out],
    )


def run_rounds(rounds: Rounds, start: str, asked: Sequence[AskedPrompt]) -> list[RoundResult]:
    """Up to `rounds.count` rounds from the model `start` on; each trains from the adapter of the one before.

    Ends early where the held-out win rate against the start has not risen beyond its interval. What an earlier call
    has finished in the folder is not done again.
    """
    sampled, held_out = split_prompts(asked, rounds.settings.seed)
    click.echo(f"{len(held_out):,} prompts are held out, {len(sampled):,} are sampled from", err=True)
    results: list[RoundResult] = []
    opened = rounds.open_model(start)
    first = _held_out_answers(rounds, opened, held_out, "start")
    previous, before = start, 0.5
    for number in range(1, rounds.count + 1):
        click.echo(f"\nround {number} of {rounds.count}, from {previous}", err=True)
        out = rounds.folder / f"round-{number}.jsonl"
        settings = replace(rounds.settings, seed=rounds.settings.seed + number - 1)
        made = rounds.make_pairs(opened, sampled, out, settings)
        del opened
        free_cached_memory()
        adapter = rounds.folder / f"round-{number}"
        steps = _train(rounds, out, adapter, Path(previous).expanduser())
        opened = rounds.open_model(str(adapter))
        answers = _held_out_answers(rounds, opened, held_out, f"round-{number}")
        results.append(_judge_round(rounds, number, len(made.choice.pairs), steps, held_out, first, answers))
        write_json(rounds.folder / ROUNDS_FILE, [asdict(result) for result in results])
        if results[-1].interval[0] <= before:
            rate = f"{results[-1].win_rate:.2f} has not risen beyond its interval from {before:.2f}"
            click.echo(f"round {number}: the held-out win rate of {rate}; no further round", err=True)
            break
        previous, before = str(adapter), results[-1].win_rate
    return results


def rounds_table(results: Sequence[RoundResult]) -> list[str]:
    """A line for each round."""
    lines = ["round  pairs  steps  win rate  95 % interval     score  tokens"]
    for each in results:
        low, high = each.interval
        lines.append(
            f"{each.round:>5}  {each.pairs:>5,}  {each.steps:>5,}  {each.win_rate:>8.3f}  {low:.3f}-{high:.3f}    "
            f"{each.mean_score:>8.3f}  {each.mean_tokens:>6.1f}"
        )
    return lines


def _held_out_answers(
    rounds: Rounds, opened: OpenedModel, held_out: Sequence[AskedPrompt], name: str
) -> list[SampledAnswer]:
    """The model's greedy answer to each held-out prompt; an empty one where the prompt is too long for the model."""
    greedy = SamplingParams(temperature=0, max_new_tokens=rounds.settings.max_new_tokens, seed=0)
    out = rounds.folder / f"{name}.held-out"
    journal = answer_prompts(opened, False, held_out, 1, greedy, out, lambda prompts: None)
    journal.close()
    return [(recorded_answers(journal, prompt) or [SampledAnswer("", 0, True)])[0] for prompt in held_out]


def _train(rounds: Rounds, pairs: Path, folder: Path, start: Path) -> int:
    """Train the recipe on a file of pairs, from `start` on if that is an adapter; returns the number of steps."""
    changes = [f"data.train={json.dumps(str(pairs.resolve()))}"]
    if (start / ADAPTER_CONFIG_NAME).is_file():
        changes += ['reference.kind="adapter"', f"reference.path={json.dumps(str(start.resolve()))}"]
    loaded = load_recipe(rounds.recipe, changes)
    if not (folder / RESULTS_FILE).is_file() or not (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        device = select_device(loaded.recipe.model.dtype)
        resume = has_valid_checkpoint(folder)
        if folder.is_dir() and not resume:
            shutil.rmtree(folder)
        result = run_training(loaded, folder, device, RunOptions(resume=resume), run_hooks(loaded, folder, device))
        del result
        free_cached_memory()
    return int(json.loads((folder / "run.json").read_text(encoding="utf-8"))["steps"])


def _judge_round(
    rounds: Rounds,
    number: int,
    pairs: int,
    steps: int,
    held_out: Sequence[AskedPrompt],
    first: Sequence[SampledAnswer],
    answers: Sequence[SampledAnswer],
) -> RoundResult:
    """Compare a round's held-out answers with the start's; the scores are kept beside the answers."""
    out = rounds.folder / f"round-{number}.held-out"
    journal = Journal(scores_path(out), {"scorer": rounds.scorer.settings, "answers": answers_path(out).name})
    won, scores = 0.0, []
    for prompt, before, now in zip(held_out, first, answers, strict=True):
        if prompt.digest not in journal.records:
            equal = before.text.strip() == now.text.strip()
            values: Any = rounds.scorer.score(prompt, [now] if equal else [before, now])
            journal.append(prompt.digest, [values[0], values[0]] if equal else values)
        old, new = journal.records[prompt.digest]
        decided = old is not None and new is not None and old != new
        won += float(new > old) if decided else 0.5
        scores += [new] if new is not None else []
    journal.close()
    return RoundResult(
        number,
        pairs,
        steps,
        won / len(held_out),
        wilson_interval(won, len(held_out)),
        sum(scores) / max(len(scores), 1),
        sum(answer.tokens for answer in answers) / len(answers),
    )
