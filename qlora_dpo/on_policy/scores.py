"""Scores a model's answers: by a judge, a Python function, a pattern, their length, or an adapter's implicit reward."""

import importlib.util
import math
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from peft import PeftModel

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.errors import RecipeError, SourceError
from qlora_dpo.model.device import Device
from qlora_dpo.on_policy.answers import SampledAnswer
from qlora_dpo.on_policy.prompts import AskedPrompt
from qlora_dpo.talk.judge import CompletionPair, Judge, judge_prompts, parse_verdict
from qlora_dpo.talk.reward import implicit_reward

ScoreAnswers = Callable[[AskedPrompt, Sequence[SampledAnswer]], list[float | None]]
"""The scores of different answers to a prompt, higher for better; None for one that has none."""

MIN_VERDICTS = 20
"""Replies of a judge after which more replies without a verdict than with one end the work."""


@dataclass(frozen=True)
class Scorer:
    """How answers are scored, and what that is called in the manifest."""

    settings: dict[str, Any]
    score: ScoreAnswers


def length_scorer(longer: bool) -> Scorer:
    """The number of tokens, or minus that."""
    sign = 1.0 if longer else -1.0
    return Scorer(
        {"by": "longer" if longer else "shorter"}, lambda prompt, answers: [sign * answer.tokens for answer in answers]
    )


def pattern_scorer(pattern: str) -> Scorer:
    """1 for an answer in which the regular expression is found, else 0; raises RecipeError if it is none."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"--matches {pattern}: is no regular expression: {error}") from error
    return Scorer(
        {"by": "matches", "pattern": pattern},
        lambda prompt, answers: [float(bool(compiled.search(answer.text))) for answer in answers],
    )


def rule_scorer(where: str) -> Scorer:
    """The user's function `FILE.py:NAME` of the prompt's messages and the answer's text, run in this process.

    It returns a number, True or False, or None for an answer that is to be left out. Raises RecipeError if the file
    cannot be imported, or lacks the function.
    """
    file, _, name = where.rpartition(":")
    path = Path(file).expanduser()
    if path.suffix != ".py" or not name.isidentifier():
        raise RecipeError(f"--rule {where}: names no function; write FILE.py:FUNCTION")
    if not path.is_file():
        raise RecipeError(f"--rule {where}: there is no file {path}; write FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(f"_rule_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # noqa: S101 - of a file that ends with .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(f"--rule {where}: {_failure_place(path, error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(f"--rule {where}: {path} has no function {name}")

    def score(prompt: AskedPrompt, answers: Sequence[SampledAnswer]) -> list[float | None]:
        return [_call_rule(function, where, path, prompt, answer) for answer in answers]

    return Scorer({"by": "rule", "function": name, "file": path.name, "code": path.read_text(encoding="utf-8")}, score)


def _call_rule(
    function: Callable[..., Any], where: str, path: Path, prompt: AskedPrompt, answer: SampledAnswer
) -> float | None:
    shown = sanitize_text(prompt.messages[-1]["content"])[:60]
    try:
        value = function([dict(turn) for turn in prompt.messages], answer.text)
    except Exception as error:
        raise RecipeError(f'--rule {where}: fails on an answer to "{shown}": {_failure_place(path, error)}') from error
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise RecipeError(
            f'--rule {where}: gives {value!r} for an answer to "{shown}"; a finite number, True, False or None would '
            "be right"
        )
    return float(value)


def _failure_place(path: Path, error: Exception) -> str:
    """What went wrong, and in which line of the user's file."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    place = f"line {lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {sanitize_text(str(error))}"


def judge_scorer(judge: Judge, where: str, model: str | None) -> Scorer:
    """The share of the other answers that an answer beats, a tie counting one half.

    Every two answers are judged in both orders; one beats the other if both verdicts are for it. Raises SourceError
    while scoring if the judge fails, or if most of its first replies hold no verdict.
    """
    replies = unclear = 0

    def verdict(prompt: str) -> str | None:
        nonlocal replies, unclear
        reply = judge(prompt)
        found = parse_verdict(reply)
        replies, unclear = replies + 1, unclear + (found is None)
        if replies >= MIN_VERDICTS and unclear > replies / 2:
            raise SourceError(
                f"--judge {where}: {unclear} of {replies} replies hold no verdict, the last one "
                f'"{sanitize_text(reply.strip())[:80]}"; they must end with [[A]], [[B]] or [[C]]'
            )
        return found

    def score(prompt: AskedPrompt, answers: Sequence[SampledAnswer]) -> list[float | None]:
        won = [0.0] * len(answers)
        for first, second in combinations(range(len(answers)), 2):
            pair = CompletionPair(prompt.messages, answers[first].text, answers[second].text)
            verdicts = [verdict(request) for request in judge_prompts(pair)]
            gain = 1.0 if verdicts == ["A", "B"] else 0.0 if verdicts == ["B", "A"] else 0.5
            won[first] += gain
            won[second] += 1 - gain
        return [wins / (len(answers) - 1) if len(answers) > 1 else 0.5 for wins in won]

    return Scorer({"by": "judge", "judge": where.rpartition("@")[2], "judge_model": model}, score)


def implicit_scorer(
    model: PeftModel, tokenizer: Any, device: Device, beta: float, adapter: str, adapter_name: str
) -> Scorer:
    """The implicit reward beta * log(pi / pi_ref) of an adapter that is attached to `model` as `adapter_name`."""

    def score(prompt: AskedPrompt, answers: Sequence[SampledAnswer]) -> list[float | None]:
        active = model.active_adapters[0]
        model.set_adapter(adapter_name)
        try:
            return [
                implicit_reward(model, tokenizer, device, prompt.messages, answer.text, answer.ended).at_beta(beta)
                for answer in answers
            ]
        finally:
            model.set_adapter(active)

    return Scorer({"by": "implicit", "adapter": adapter, "beta": beta}, score)
