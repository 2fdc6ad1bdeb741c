"""Runs a model token by token: batches of prompts with a key-value cache, or all of the text for models without one.

In names: P prompts, R rows of a batch, T tokens, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from qlora_dpo.model.decoder_layers import unwrap_peft
from qlora_dpo.talk.fused_decoder import FusedDecoder

FEW_TOKENS = 256
"""A pass over up to this many tokens is hardly slower with padding among them."""
PADDING_LIMIT = 1.1
"""Tokens with padding, for each token of a prompt, up to which prompts share a pass."""
ChooseTokens = Callable[[Tensor, Sequence[int], int], Tensor]
"""Chooses the next token (R,) of each row by logits (R, V), the numbers of the rows, and how many tokens they have."""


def supports_dynamic_cache(model: Any) -> bool:
    """False for a model that has no key-value cache (GPT-1), or one of a class of its own (MiniMax, RWKV)."""
    plain = unwrap_peft(model)
    return _cache_name(plain) in signature(type(plain).forward).parameters and plain._supports_default_dynamic_cache()


def empty_cache(model: Any) -> DynamicCache | None:
    """None for a model without such a cache: all of its text is run for each token."""
    return DynamicCache(config=model.config) if supports_dynamic_cache(model) else None


def prompt_batches(
    lengths: Sequence[int], max_new_tokens: int, batch_tokens: int, *, padded: bool = True
) -> Iterator[list[int]]:
    """Indices of prompts by rising length, in batches of `batch_tokens` with padding and completions.

    Without padding, the prompts of a batch have one length.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        is_full = (len(batch) + 1) * (lengths[index] + max_new_tokens) > batch_tokens
        if batch and (is_full or not (padded or lengths[index] == lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def decode_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    pad: int,
    max_new_tokens: int,
    choose: ChooseTokens,
    copies: int = 1,
    decoder: FusedDecoder | None = None,
) -> list[list[int]]:
    """Continue left-padded `prompts`, each `copies` times, with the tokens that `choose` names, end tokens included.

    A prompt is run once for all of its copies, which follow each other in the result. A finished row leaves the batch.
    `decoder` has the weights of `model`, and takes over after the prompts.
    """
    if decoder is not None:
        return _decode_fused(model, decoder, prompts, stop_ids, pad, max_new_tokens, choose, copies)
    ids_RT, mask_RT, position_RT = _left_padded(model, prompts, pad)
    device = ids_RT.device
    past = empty_cache(model)
    is_recurrent = getattr(unwrap_peft(model), "_is_stateful", False) and not _takes_positions(model)
    completions: list[list[int]] = [[] for _ in range(len(prompts) * copies)]
    live = list(range(len(completions)))
    for count in range(max_new_tokens):
        # Once the prompt was run, a recurrent state is past all padding; FalconMamba would mask its new tokens by it
        mask = {} if is_recurrent and count else {"attention_mask": mask_RT}
        logits_RV = last_logits(model, ids_RT, past, position_ids=position_RT, **mask)
        if count == 0 and copies > 1:
            prompt_R = torch.arange(len(prompts), device=device).repeat_interleave(copies)
            ids_RT, mask_RT, position_RT, logits_RV = (
                each[prompt_R] for each in (ids_RT, mask_RT, position_RT, logits_RV)
            )
            if past is not None:
                past.reorder_cache(prompt_R)
        chosen_R = choose(logits_RV, live, count)
        unfinished = _append_tokens(completions, live, chosen_R, stop_ids)
        if not unfinished:
            break
        if len(unfinished) < len(live):
            if past is not None:  # unlike batch_select_indices, this knows recurrent states too
                past.reorder_cache(torch.tensor(unfinished, device=device))
            live = [live[index] for index in unfinished]
        new_R1 = chosen_R[unfinished, None]
        mask_RT = torch.cat([mask_RT[unfinished], torch.ones_like(new_R1)], dim=-1)
        if past is None:
            ids_RT, position_RT = torch.cat([ids_RT[unfinished], new_R1], dim=-1), mask_RT.cumsum(-1) - 1
        else:
            ids_RT, position_RT = new_R1, position_RT[unfinished, -1:] + 1
    return completions


def _left_padded(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and positions (R, T) of prompts."""
    longest = max(len(prompt) for prompt in prompts)
    device = model.get_input_embeddings().weight.device
    ids_RT = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask_RT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids_RT, mask_RT, (mask_RT.cumsum(-1) - 1).clamp(min=0)


def _decode_fused(
    model: Any,
    decoder: FusedDecoder,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    pad: int,
    max_new_tokens: int,
    choose: ChooseTokens,
    copies: int,
) -> list[list[int]]:
    """Continue prompts as `decode_batch` does: the model runs those of similar length at once, `decoder` the rest."""
    passes, logits = list[tuple[DynamicCache, list[int]]](), list[Tensor]()
    for start, end in _similar_lengths([len(prompt) for prompt in prompts]):
        ids_RT, mask_RT, position_RT = _left_padded(model, prompts[start:end], pad)
        past = DynamicCache(config=model.config)
        logits.append(last_logits(model, ids_RT, past, position_ids=position_RT, attention_mask=mask_RT))
        passes.append((past, [len(prompt) for prompt in prompts[start:end]]))
    cache = decoder.cache(passes, copies, max_new_tokens)
    del passes
    logits_RV = torch.cat(logits).repeat_interleave(copies, dim=0)
    completions: list[list[int]] = [[] for _ in range(len(prompts) * copies)]
    live, slot_R = list(range(len(completions))), torch.arange(len(completions))
    for count in range(max_new_tokens):
        chosen_R = choose(logits_RV, live, count)
        unfinished = _append_tokens(completions, live, chosen_R, stop_ids)
        if not unfinished or count + 1 == max_new_tokens:
            break
        live = [live[index] for index in unfinished]
        slot_R = cache.keep_rows(slot_R[unfinished])
        logits_RV = decoder.next_logits(chosen_R[unfinished], cache, slot_R)
    return completions


def _append_tokens(
    completions: list[list[int]], live: Sequence[int], chosen_R: Tensor, stop_ids: Collection[int]
) -> list[int]:
    """Append each live row's token; returns the indices in `live` of rows that it does not end."""
    tokens = chosen_R.tolist()
    for row, token in zip(live, tokens, strict=True):
        completions[row].append(token)
    return [index for index, token in enumerate(tokens) if token not in stop_ids]


def _similar_lengths(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours whose padding takes at most a tenth of their tokens, or that are few tokens anyway."""
    start = 0
    for end in range(1, len(lengths) + 1):
        padded = lengths[start : end + 1]
        tokens = max(padded) * len(padded)
        if end == len(lengths) or (tokens > FEW_TOKENS and tokens > PADDING_LIMIT * sum(padded)):
            yield start, end
            start = end


def last_logits(model: Any, ids_RT: Tensor, past: DynamicCache | None, **padding: Tensor) -> Tensor:
    """The next token's logits (R, V) after `ids_RT`, which follow what `past` holds."""
    if not _takes_positions(model):
        padding.pop("position_ids", None)
    cache = {"use_cache": False} if past is None else {"use_cache": True, _cache_name(model): past}
    logits_RV: Tensor = model(input_ids=ids_RT, logits_to_keep=1, **cache, **padding).logits[:, -1]
    return logits_RV


def _takes_positions(model: Any) -> bool:
    """Whether the model is told the positions of its tokens; those of recurrent layers alone, and BLOOM, are not."""
    return "position_ids" in signature(type(unwrap_peft(model)).forward).parameters


def _cache_name(model: Any) -> str:
    """The keyword of the key-value cache: `cache` since transformers 5.24, which warns about the older name."""
    return "cache" if "cache" in signature(type(unwrap_peft(model)).forward).parameters else "past_key_values"
