"""Truncates the prompts of pairs that are too long, at the front; answers are never truncated."""

from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from qlora_dpo.data.dialogue import InvalidRow, Message
from qlora_dpo.data.pairs import Pair

PROMPT_TRUNCATED = "prompt cut at the front"
"""The repair, in the words of the audit table."""


def truncate_prompt(pair: Pair, tokenizer: PreTrainedTokenizerBase, excess: Callable[[Pair], int]) -> Pair:
    """Return `pair` with as little as possible cut off the front of its prompt until `excess` is 0 or less.

    `excess(pair)` encodes the pair and returns by how many tokens it is too long, so the template stays whole. The
    system turn stays. The oldest turns go first, each question with its answer and tool turns, then whole tokens from
    the front of the last user turn. Raises InvalidRow if nothing of that turn would be left.
    """
    has_system = pair.prompt[0]["role"] == "system"
    head, turns = pair.prompt[:has_system], pair.prompt[has_system:]
    num_excess = excess(pair)
    questions = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    while num_excess > 0 and len(questions) > 1:
        turns = turns[questions[1] - questions[0] :]
        del questions[0]
        num_excess = excess(replace(pair, prompt=head + turns))
    text = turns[0]["content"]
    starts = _token_starts(text, tokenizer) if num_excess > 0 else []
    cut = 0
    while num_excess > 0:
        cut += num_excess
        rest = text[starts[cut] :] if cut < len(starts) else ""
        if not rest.strip():
            raise InvalidRow("answer leaves no room for a prompt in max_length")
        user: Message = {"role": "user", "content": rest}
        turns = (user, *turns[1:])
        num_excess = excess(replace(pair, prompt=head + turns))
    return replace(pair, prompt=head + turns)


def _token_starts(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The character at which each token of `text` starts; without a fast tokenizer, every character."""
    if not tokenizer.is_fast:
        return list(range(len(text)))
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    return [start for start, _ in encoded["offset_mapping"]]
