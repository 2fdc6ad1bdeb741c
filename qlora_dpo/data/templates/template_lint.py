"""Finds what a model's chat template and its tokens make of pairs: refusals, changes, pairs that are too long."""

from collections.abc import Sequence
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora_dpo.data.audit import part_quantiles
from qlora_dpo.data.dialogue import Message, sanitize_text
from qlora_dpo.data.encode import ENCODE_CHUNK, encode_pairs, pair_num_tokens
from qlora_dpo.data.lint import LintFinding
from qlora_dpo.data.pairs import Pair
from qlora_dpo.data.templates.chat_format import detect_chat_format
from qlora_dpo.data.templates.chat_template import list_repairs, template_traits
from qlora_dpo.recipe.data import DataTable

TokenQuantiles = dict[str, tuple[int, int, int]]
"""What `part_quantiles` returns."""


def find_template_problems(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, table: DataTable
) -> tuple[list[LintFinding], TokenQuantiles]:
    """Pairs that training with this tokenizer would drop, cut or change, and the lengths of all that have tokens.

    Raises ModelError for a tokenizer without a chat template, and for one that cannot be used.
    """
    form = detect_chat_format(tokenizer)
    traits = template_traits(tokenizer)
    refused, repaired, overlong = dict[str, list[int]](), dict[str, list[int]](), list[int]()
    lengths: list[tuple[int, int, int]] = []
    remaining = iter(pairs)
    while chunk := list(islice(remaining, ENCODE_CHUNK)):
        for pair, result in zip(chunk, encode_pairs(chunk, tokenizer, form), strict=True):
            if isinstance(result, str):
                refused.setdefault(result, []).append(pair.row)
                continue
            lengths.append((len(result.prompt), len(result.chosen), len(result.rejected)))
            if pair_num_tokens(result) > table.max_length:
                overlong.append(pair.row)
            texts = filter(None, (pair.chosen, pair.rejected))
            answers: list[Message] = [{"role": "assistant", "content": text} for text in texts]
            for repair in list_repairs(traits, [*pair.prompt, *answers], pair.tools):
                repaired.setdefault(repair, []).append(pair.row)
    findings = [
        LintFinding(f"no pair for this model: {sanitize_text(reason)}", _distinct(rows), "mend or remove")
        for reason, rows in refused.items()
    ]
    if overlong:
        is_cut = table.overlong == "cut_prompt"
        advice = "the prompt is cut at the front" if is_cut else "shorten it, or raise data.max_length"
        problem = f"longer than data.max_length = {table.max_length} tokens"
        findings.append(LintFinding(problem, _distinct(overlong), advice, fixable=not is_cut))
    findings += [
        LintFinding(f"changed for this model: {repair}", _distinct(rows), "look at it with data show --model", False)
        for repair, rows in repaired.items()
    ]
    return findings, part_quantiles(np.array(lengths, dtype=np.int32).reshape(-1, 3))


def _distinct(rows: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(set(rows)))
