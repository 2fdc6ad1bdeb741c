"""Replies of families with recurrent layers, with a cache of their own, or with none, equal those of a plain pass."""

from typing import Any

import architectures
import pytest
import tiny
import torch
from architectures import GPT, LINEAR, MIXER, NEMOTRON, STATE

from qlora_dpo.talk.generate import (
    KVCache,
    generate_greedy,
    generate_stream,
    sample_completions,
    stop_token_ids,
    tokenize_prompt,
)
from qlora_dpo.talk.sampling import SamplingParams

MINIMAX = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 16}
JAMBA = {
    "num_experts": 2,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Bamba": {**MIXER, "attn_layer_indices": [1]},  # counts positions from 0 in every pass, unless it is told them
    "Bloom": {},  # takes no positions, and reads them off the mask
    "FalconMamba": STATE,  # masks a new token by the prompt's padding
    "Jamba": JAMBA,
    "Lfm2": {},
    "Mamba2": {**STATE, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "MiniMax": MINIMAX,
    "NemotronH": NEMOTRON,
    "OpenAIGPT": GPT,
    "Qwen3_5Text": LINEAR,
    "Rwkv": {"attention_hidden_size": 32},
    "xLSTM": {"num_heads": 4, "num_blocks": 2},
}
QUESTIONS = ("rice?", "How do I find a book about birds?", "Thank you")
PROMPTS = [[{"role": "user", "content": question}] for question in QUESTIONS]


@torch.no_grad()
def continuation(model: Any, ids: list[int], stop_ids: frozenset[int], most: int) -> list[int]:
    """The likeliest tokens after `ids`, all of which is run anew for each of them."""
    new: list[int] = []
    while len(new) < most and (not new or new[-1] not in stop_ids):
        new.append(int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("kind", FAMILIES)
def test_replies_are_those_of_a_pass_without_a_cache(kind: str) -> None:
    model = architectures.made(architectures.tiny_config(kind, vocab_size=400, **FAMILIES[kind]))
    tokenizer = tiny.tokenizer()
    stop_ids, encoded = stop_token_ids(model, tokenizer), [tokenize_prompt(tokenizer, prompt) for prompt in PROMPTS]
    expected = [continuation(model, ids, stop_ids, 8) for ids in encoded]
    assert [list(completion.ids) for completion in generate_greedy(model, tokenizer, PROMPTS, 8)] == expected

    greedy, kv_cache = SamplingParams(temperature=0, max_new_tokens=8, seed=0), KVCache()
    for ids in (encoded[0], [*encoded[0], *expected[0][:3], *encoded[2]]):  # the second turn leaves the first behind
        new = continuation(model, ids, stop_ids, 8)
        text = "".join(generate_stream(model, tokenizer, ids, greedy, kv_cache))
        assert text == tokenizer.decode([token for token in new if token not in stop_ids], skip_special_tokens=True)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_reply_that_ends_first_leaves_the_batch(kind: str) -> None:
    """Recurrent states leave it too; the second token of the second reply is made the one that ends a turn."""
    model = architectures.made(architectures.tiny_config(kind, vocab_size=400, **FAMILIES[kind]))
    tokenizer = tiny.tokenizer()
    model.generation_config.eos_token_id = generate_greedy(model, tokenizer, PROMPTS[1:2], 2)[0].ids[-1]
    stop_ids, encoded = stop_token_ids(model, tokenizer), [tokenize_prompt(tokenizer, prompt) for prompt in PROMPTS]
    expected = [continuation(model, ids, stop_ids, 8) for ids in encoded]
    assert len(expected[1]) <= 2
    assert [list(completion.ids) for completion in generate_greedy(model, tokenizer, PROMPTS, 8)] == expected


@pytest.mark.parametrize("kind", FAMILIES)
def test_samples_of_a_prompt_share_its_pass(kind: str) -> None:
    """The most likely tokens, three times, are those of the greedy reply."""
    model = architectures.made(architectures.tiny_config(kind, vocab_size=400, **FAMILIES[kind]))
    tokenizer = tiny.tokenizer()
    greedy = generate_greedy(model, tokenizer, PROMPTS, 6)
    settings = SamplingParams(temperature=0, max_new_tokens=6, seed=0)
    encoded = [tokenize_prompt(tokenizer, prompt) for prompt in PROMPTS]
    for indices, completions in sample_completions(model, tokenizer, encoded, 3, settings, "abc", 10_000):
        for index, found in zip(indices, completions, strict=True):
            assert [each.ids for each in found] == [greedy[index].ids] * 3
