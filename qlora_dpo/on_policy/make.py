"""From prompts to a file of pairs: answers, scores and pairs, each kept so that a killed command goes on."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dpo.adapter import OpenedModel
from qlora_dpo.data.pair_origin import write_origin
from qlora_dpo.files import atomic_write, file_sha256
from qlora_dpo.on_policy.answers import SampledAnswer, recorded_answers, sample_answers
from qlora_dpo.on_policy.choose import (
    AnswerPair,
    PairChoice,
    PairingRule,
    ScoredAnswer,
    choose_pairs,
    length_effect,
    usable_answers,
)
from qlora_dpo.on_policy.journal import Journal
from qlora_dpo.on_policy.prompts import AskedPrompt, prompts_digest
from qlora_dpo.on_policy.scores import Scorer
from qlora_dpo.talk.sampling import SamplingParams

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class PairsResult:
    """The pairs that were written, and how long their answers are, in tokens."""

    choice: PairChoice
    chosen_tokens: list[int]
    rejected_tokens: list[int]

    @property
    def effect(self) -> float | None:
        """Cohen's d of the lengths of chosen and rejected answers."""
        return length_effect(self.chosen_tokens, self.rejected_tokens)


def answers_path(pairs: Path) -> Path:
    """Where the answers for a file of pairs are kept."""
    return pairs.with_name(f"{pairs.name}.answers")


def scores_path(pairs: Path) -> Path:
    """Where the scores of those answers are kept."""
    return pairs.with_name(f"{pairs.name}.scores")


def describe_model(opened: OpenedModel, base: bool) -> dict[str, Any]:
    """What wrote the answers: the model's name and fingerprint, and the adapter's unless it is off."""
    adapter = None if base or opened.table is None or opened.folder is None else opened.folder
    weights = adapter / ADAPTER_WEIGHTS if adapter is not None else None
    return {
        "name": opened.source.hub_id or opened.source.name,
        "fingerprint": opened.source.fingerprint,
        "quantization": opened.table.quantization if opened.table is not None else "none",
        "adapter": adapter.resolve().name if adapter is not None else None,
        "adapter_sha256": file_sha256(weights) if weights is not None and weights.is_file() else None,
        "computed_in": f"{opened.device.compute_dtype} on {opened.device.type.upper()}",
    }


def sampling_record(settings: SamplingParams, copies: int) -> dict[str, Any]:
    """How answers are sampled, for journal and manifest."""
    return {"samples": copies, **vars(settings)}


def answer_prompts(
    opened: OpenedModel,
    base: bool,
    prompts: Sequence[AskedPrompt],
    copies: int,
    settings: SamplingParams,
    out: Path,
    advance: Callable[[int], None],
) -> Journal:
    """The journal of answers, complete for `prompts`; `advance` receives the number of prompts that were answered."""
    made_with = {"model": describe_model(opened, base), "sampling": sampling_record(settings, copies)}
    journal = Journal(answers_path(out), made_with)
    advance(sum(prompt.digest in journal.records for prompt in prompts))
    sample_answers(opened, prompts, copies, settings, journal, advance)
    return journal


def score_answers(
    prompts: Sequence[AskedPrompt],
    answers: Journal,
    scorer: Scorer,
    out: Path,
    advance: Callable[[int], None],
) -> Journal:
    """The journal of scores of each prompt's usable answers, in their order; `advance` receives numbers of prompts."""
    journal = Journal(scores_path(out), {"scorer": scorer.settings, "answers": answers.settings})
    advance(sum(prompt.digest in journal.records for prompt in prompts))
    for prompt in prompts:
        if prompt.digest not in journal.records:
            usable = usable_answers(recorded_answers(answers, prompt), Counter())
            journal.append(prompt.digest, scorer.score(prompt, usable) if usable else [])
            advance(1)
    return journal


def most_answers(answers: Journal) -> int:
    """The number of answers to a prompt, or to the one with most."""
    return max(map(len, answers.records.values()), default=0)


def write_pairs(
    prompts: Sequence[AskedPrompt],
    answers: Journal,
    scores: Journal | None,
    rule: PairingRule,
    count_tokens: Callable[[str], int],
    out: Path,
    origin: dict[str, Any],
) -> PairsResult:
    """Choose the pairs and write them to `out`, a JSON line each, with a manifest beside it that begins with `origin`.

    A file without pairs is not written.
    """
    choice = PairChoice()
    for prompt in prompts:
        usable = usable_answers(recorded_answers(answers, prompt), choice.left_out)
        values = scores.records[prompt.digest] if scores is not None else [None] * len(usable)
        scored = [ScoredAnswer(answer, value) for answer, value in zip(usable, values, strict=True)]
        if scores is not None:
            choice.left_out["answers without a score"] += sum(each.score is None for each in scored)
            scored = [each for each in scored if each.score is not None]
        choose_pairs(prompt, scored, rule, choice)
    choice.left_out = +choice.left_out
    chosen = [_tokens(pair.chosen, count_tokens) for pair in choice.pairs]
    result = PairsResult(choice, chosen, [pair.rejected.answer.tokens for pair in choice.pairs])
    if not choice.pairs:
        return result
    atomic_write(out, "".join(json.dumps(_row(pair), ensure_ascii=False) + "\n" for pair in choice.pairs))
    write_origin(
        out,
        {
            **origin,
            "prompts": {"count": len(prompts), "digest": prompts_digest(prompts), **origin.get("prompts", {})},
            **answers.settings,
            "scores": scores.settings["scorer"] if scores is not None else None,
            "pairing": rule,
            "pairs": len(choice.pairs),
            "left_out": dict(choice.left_out),
            "chosen_tokens": round(statistics.fmean(result.chosen_tokens), 1),
            "rejected_tokens": round(statistics.fmean(result.rejected_tokens), 1),
            "length_effect": round(result.effect, 3) if result.effect is not None else None,
        },
    )
    return result


def _tokens(scored: ScoredAnswer, count_tokens: Callable[[str], int]) -> int:
    """The tokens of an answer; one of the data has not been counted yet."""
    return scored.answer.tokens or count_tokens(scored.answer.text)


def _row(pair: AnswerPair) -> dict[str, Any]:
    scores = {
        f"{side}_score": round(scored.score, 6)
        for side, scored in (("chosen", pair.chosen), ("rejected", pair.rejected))
        if scored.score is not None
    }
    return {
        "prompt": list(pair.prompt.messages),
        "chosen": _as_message(pair.chosen.answer),
        "rejected": _as_message(pair.rejected.answer),
        **scores,
    }


def _as_message(answer: SampledAnswer) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer.text}]
