"""Packed rows give each pair the log-probabilities and gradients it has padded, however the row is cut and ordered."""

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import architectures
import pytest
import tiny_run
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.attention import varlen

from qlora_dpo.data.encoded import EncodedPair, digest_ids
from qlora_dpo.errors import ModelError
from qlora_dpo.model.decoder_layers import set_gradient_checkpointing
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.packed import attention
from qlora_dpo.model.packed.attention import Backend, PackedLayout, Span
from qlora_dpo.preference import logps, pack
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.pack import Packing, collate
from qlora_dpo.preference.packing_choice import choose_packing

pytestmark = tiny_run.LIBRARIES_WARN

EXACT = 1e-5
"""Relative, in float32."""
ROWS_OF_300 = replace(tiny_run.PADDED, token_budget=300)
KINDS = pytest.mark.parametrize("kind", list(architectures.CONFIGS))
BACKENDS = pytest.mark.parametrize("backend", ["spans", "batched"])


def tuned(kind: str, *, lean: bool = True) -> Any:
    """A tiny model of this kind with an adapter that does something, ready for packed rows."""
    base = architectures.made(architectures.CONFIGS[kind])
    attention.enable_packed_attention(base)
    torch.manual_seed(0)
    model = tiny_run.stirred(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")))
    if lean:
        fuse_lora(model, torch.float32)
    return model


def drawn(seed: int, count: int) -> list[EncodedPair]:
    """Pairs as real data has them: a common system prompt or none, prompts of one token, prompts shared by several
    pairs, later turns of earlier dialogues, answers of one token, answers that begin alike.
    """
    draw = random.Random(seed)

    def ids(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 320) for _ in range(draw.randint(least, most)))

    system = draw.choice([(), ids(1, 30)])
    pairs: list[EncodedPair] = []
    while len(pairs) < count:
        earlier = draw.choice(pairs) if pairs else None
        match draw.randrange(4) if earlier else 3:
            case 0:
                prompt = earlier.prompt if earlier else ()
            case 1:
                prompt = (*earlier.prompt, *earlier.chosen, *ids(1, 9)) if earlier else ()
            case _:
                prompt = system + ids(1, 40)
        alike = draw.choice([(), ids(1, 6)])
        chosen, rejected = alike + ids(1, 20), alike + ids(1, 20)
        if chosen != rejected:
            pairs.append(EncodedPair(prompt, chosen, rejected, len(pairs) + 1, digest_ids(prompt, chosen, rejected)))
    return pairs


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=EXACT, atol=1e-4)
    assert tiny_run.apart(found[0], expected[0]) < EXACT
    assert tiny_run.apart(found[1], expected[1]) < EXACT


@KINDS
@BACKENDS
def test_packed_rows_are_exact_for_every_architecture(kind: str, backend: Backend) -> None:
    model, pairs = tuned(kind), drawn(1, 12)
    expected = tiny_run.logps_and_gradients(tuned(kind, lean=False), pairs, tiny_run.PADDED)
    assert_same(tiny_run.logps_and_gradients(model, pairs, Packing(200, tiny_run.PAD, backend)), expected)


@pytest.mark.parametrize("seed", range(12))
def test_packed_rows_are_exact_for_random_pairs(seed: int) -> None:
    pairs = drawn(seed, [1, 2, 3, 5, 8, 13, 16, 24, 32, 40, 50, 64][seed])
    model = tuned("qwen2")
    expected = tiny_run.logps_and_gradients(model, pairs, tiny_run.PADDED)
    assert_same(
        tiny_run.logps_and_gradients(
            model, pairs, Packing(random.Random(seed).choice([64, 150, 600]), tiny_run.PAD, "spans")
        ),
        expected,
    )


@pytest.mark.parametrize("budget", [1, 40, 200, 10_000])
@BACKENDS
def test_the_row_budget_changes_nothing(budget: int, backend: Backend) -> None:
    model, pairs = tuned("llama"), drawn(3, 14)
    assert_same(
        tiny_run.logps_and_gradients(model, pairs, Packing(budget, tiny_run.PAD, backend)),
        tiny_run.logps_and_gradients(model, pairs, tiny_run.PADDED),
    )


def test_the_order_of_pairs_changes_nothing() -> None:
    model, pairs = tuned("llama"), drawn(4, 10)
    logps_P2, _ = tiny_run.logps_and_gradients(model, pairs, tiny_run.PACKED)
    turned_P2, _ = tiny_run.logps_and_gradients(model, pairs[::-1], tiny_run.PACKED)
    torch.testing.assert_close(turned_P2.flip(0), logps_P2, rtol=EXACT, atol=1e-5)


def test_sharing_a_prefix_or_not_changes_nothing() -> None:
    model, pairs = tuned("qwen3"), drawn(5, 9)
    together, _ = tiny_run.logps_and_gradients(model, pairs, tiny_run.PACKED)
    alone = torch.cat([tiny_run.logps_and_gradients(model, [pair], tiny_run.PACKED)[0] for pair in pairs])
    torch.testing.assert_close(together, alone, rtol=EXACT, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_checkpointing_changes_nothing(layers: int) -> None:
    model, pairs = tuned("qwen2"), drawn(6, 8)
    expected = tiny_run.logps_and_gradients(model, pairs, tiny_run.PACKED)
    set_gradient_checkpointing(model.train(), layers)
    assert_same(tiny_run.logps_and_gradients(model, pairs, tiny_run.PACKED), expected)


@pytest.mark.parametrize(("states", "words"), [(1, 7), (5, 64), (1000, 1000)])
def test_the_heads_chunks_change_nothing(states: int, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = tuned("gemma"), drawn(7, 8)
    expected = tiny_run.logps_and_gradients(model, pairs, tiny_run.PACKED)
    monkeypatch.setattr(pack, "STATES_PER_CHUNK", states)
    monkeypatch.setattr(logps, "VOCAB_TILE", {"cpu": words})
    assert_same(tiny_run.logps_and_gradients(model, pairs, tiny_run.PACKED), expected)


@pytest.mark.parametrize("tile", [3, 16])
def test_the_tiles_of_attention_change_nothing(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = tuned("llama"), drawn(8, 8)
    expected = tiny_run.logps_and_gradients(model, pairs, tiny_run.PACKED)
    monkeypatch.setattr(attention, "SPAN_TILE", tile)
    assert_same(tiny_run.logps_and_gradients(model, pairs, tiny_run.PACKED), expected)


def test_a_row_where_rejected_sees_chosen_is_not_exact() -> None:
    # the planted leak: what the tests above would have to notice
    model, pairs = tuned("llama"), tiny_run.pairs(3)
    right = collate(pairs, tiny_run.PACKED)
    assert right.layout is not None
    first, second, *others = right.layout.spans
    assert second.prefix and second.prefix[-1][1] < first.stop
    leaking = replace(second, prefix=((first.start, first.stop),))
    wrong = replace(right, layout=PackedLayout((first, leaking, *others), "spans", torch.device("cpu")))
    sound, leaked = (score_batch(model, batch, tiny_run.CPU) for batch in (right, wrong))
    difference = (sound.rejected_logp_P - leaked.rejected_logp_P).abs() + (
        sound.chosen_logp_P - leaked.chosen_logp_P
    ).abs()
    assert difference.max() > 1e-2


@pytest.mark.parametrize(("dtype", "logp_bound", "gradient_bound"), [("bf16", 2e-2, 5e-2)])
def test_in_16_bits_packed_and_padded_differ_by_rounding_only(
    dtype: Any, logp_bound: float, gradient_bound: float
) -> None:
    place = tiny_run.device.select_device(dtype)
    model, pairs = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe(), place)), tiny_run.pairs(8)
    found = []
    for packing in (tiny_run.PACKED, tiny_run.PADDED):
        model.zero_grad()
        scores = score_batch(model, collate(pairs, packing), place)
        (scores.chosen_logp_P - scores.rejected_logp_P).sum().backward()
        found.append((torch.cat([scores.chosen_logp_P, scores.rejected_logp_P]).detach(), tiny_run.gradients(model)))
    assert tiny_run.apart(found[0][0], found[1][0]) < logp_bound
    assert tiny_run.apart(found[0][1], found[1][1]) < gradient_bound


WINDOWS = pytest.mark.parametrize("window", [None, 1, 4])


@BACKENDS
@WINDOWS
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
def test_attention_of_a_layout_is_plain_attention_of_each_sequence(
    backend: Backend, window: int | None, heads: tuple[int, int]
) -> None:
    # prompt 0-7 with answers 7-10 and 10-15, and a second turn 15-19 that follows the first answer
    spans = (Span(0, 10), Span(10, 15, ((0, 7),)), Span(15, 19, ((0, 10),)))
    layout = PackedLayout(spans, backend, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, count, 19, 8, dtype=torch.float64, generator=generator) for count in (heads[0], *heads[1:] * 2)
    )
    found = attention.attention_function(backend)(query, key, value, layout, 0.3, window)
    group = heads[0] // heads[1]
    for span in spans:
        places = [i for start, stop in span.visible_ranges for i in range(start, stop)]
        wide = [part[:, :, places].repeat_interleave(group, 1) for part in (key, value)]
        scores = query[:, :, places] @ wide[0].transpose(2, 3) * 0.3
        hidden = torch.ones(len(places), len(places), dtype=torch.bool).triu(1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(-window)
        alone = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ wide[1]
        torch.testing.assert_close(found[:, span.start : span.stop].transpose(1, 2), alone[:, :, -span.tokens :])


def test_varlen_is_told_where_each_spans_queries_and_keys_lie() -> None:
    layout = PackedLayout((Span(0, 5), Span(5, 6, ((0, 3),))), "varlen", torch.device("cpu"))
    index = {name: numbers.tolist() for name, numbers in layout.index.items()}
    assert (index["queries"], index["keys"]) == ([0, 5, 6], [0, 5, 9])
    assert index["token"] == [0, 1, 2, 3, 4, 0, 1, 2, 5]
    assert index["order"] == [0, 5, 1, 6, 2, 7, 3, 4, 8]  # where tokens 0, 1, ... stand as keys
    assert index["counts"] == [2, 2, 2, 1, 1, 1]


def flash(query: Tensor, key: Tensor, value: Tensor, *cut: Any, window_size: tuple[int, int], scale: float) -> Tensor:
    """What torch 2.11's varlen_attn computes, here on a CPU, for as many key heads as query heads."""
    query_S, key_S, longest_query, longest_key = cut
    assert (window_size[1], query.shape[1]) == (0, key.shape[1])
    parts = []
    for (start, stop), (first, last) in zip(pairwise(query_S.tolist()), pairwise(key_S.tolist()), strict=True):
        assert (stop - start <= longest_query, last - first <= longest_key) == (True, True)
        scores = torch.einsum("qhd,khd->hqk", query[start:stop], key[first:last]) * scale
        earlier = last - first - (stop - start)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(earlier + 1)
        if window_size[0] >= 0:
            hidden |= torch.ones(scores.shape[1:], dtype=torch.bool).tril(earlier - window_size[0] - 1)
        parts.append(
            torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value[first:last])
        )
    return torch.cat(parts)


def grouped_flash(
    query: Tensor, key: Tensor, value: Tensor, *cut: Any, enable_gqa: bool = False, **more: Any
) -> Tensor:
    """What torch 2.12's computes, which may be told that heads share keys."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    group = query.shape[1] // key.shape[1]
    return flash(query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), *cut, **more)


@pytest.mark.parametrize("varlen_attn", [flash, grouped_flash])
@WINDOWS
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
def test_varlen_gives_plain_attention_by_torch_2_11s_function_and_by_later_ones(
    varlen_attn: Any, window: int | None, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    spans = (Span(0, 10), Span(10, 15, ((0, 7),)), Span(15, 19, ((0, 10),)))
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(1, count, 19, 8, dtype=torch.float64, generator=generator, requires_grad=True)
        for count in (heads[0], *heads[1:] * 2)
    ]
    found, slopes = [], []
    for backend in ("varlen", "batched"):
        layout = PackedLayout(spans, backend, torch.device("cpu"))
        answer = attention.attention_function(backend)(*parts, layout, 0.3, window)
        slopes.append(torch.autograd.grad((answer * torch.arange(8)).sum(), parts))
        found.append(answer)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(slopes[0], slopes[1])


@KINDS
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_that_rows_can_serve_is_given_rows(kind: str, dtype: Any) -> None:
    base, pairs = architectures.made(architectures.CONFIGS[kind]), drawn(9, 12)
    packing, why = choose_packing(base, pairs, ROWS_OF_300, tiny_run.device.select_device(dtype))
    assert packing.backend == "spans"
    assert why == "packed rows of up to 300 tokens, attention by spans"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("capped scores", "it caps attention scores"),
        ("learned positions", "GPT2LMHeadModel has no rotary positions"),
        ("slopes for positions", "BloomForCausalLM does not use transformers' attention interface"),
    ],
)
def test_a_model_that_rows_cannot_serve_gets_padded_batches_and_is_told_why(kind: str, reason: str) -> None:
    base, pairs = architectures.made(architectures.NOT_SERVED[kind]), tiny_run.pairs(9)
    packing, why = choose_packing(base, pairs, ROWS_OF_300, tiny_run.CPU)
    assert packing.backend is None
    assert why == f"padded batches, since {reason}"
    assert score_batch(base, collate(pairs, packing), tiny_run.CPU).chosen_logp_P.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "share", "says"),
    [
        ("fp32", 0.5, "gives other log-probabilities than padded batches"),
        # in 16 bits such a leak is smaller than what rounding does to the log-probabilities
        ("bf16", 0.5, "a token changes answers that it is no part of"),
        ("bf16", 0.05, "a token changes answers that it is no part of"),
    ],
)
def test_a_model_that_looks_fit_but_mixes_tokens_otherwise_is_found_out(dtype: Any, share: float, says: str) -> None:
    base, pairs = architectures.made(architectures.CONFIGS["llama"]), tiny_run.pairs(9)
    place = tiny_run.device.select_device(dtype)
    # a layer that looks at the token to the left, as convolutions and recurrences do, whichever sequence it is of
    base.model.layers[0].register_forward_hook(lambda layer, inputs, out: out + share * out.roll(1, 1))
    packing, why = choose_packing(base, pairs, ROWS_OF_300, place)
    assert packing.backend is None
    assert why.startswith("padded batches, since in packed rows ")
    assert says in why
    assert base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["llama", "learned positions"])
@pytest.mark.parametrize(
    ("dtype", "sentence"),
    [
        (
            "fp16",
            "this model overflows fp16: it gives the shortest pairs log-probabilities that are not finite; set "
            'model.dtype = "fp32", or take a card with bf16 (compute capability 8.0 or newer)',
        ),
        (
            "bf16",
            "this model gives the shortest pairs log-probabilities that are not finite, in bf16: its weights are "
            "damaged or do not belong to its config.json; fetch them again, or take another model",
        ),
    ],
)
def test_a_model_that_gives_nan_is_told_why_before_anything_is_compared(kind: str, dtype: Any, sentence: str) -> None:
    base = architectures.made({**architectures.CONFIGS, **architectures.NOT_SERVED}[kind])
    place = replace(tiny_run.CPU, compute_dtype=dtype)
    choose_packing(base, tiny_run.pairs(9), ROWS_OF_300, place)
    with torch.no_grad():
        # in fp16 a product beyond 65,504, which the other dtypes hold
        base.get_output_embeddings().weight.mul_(1e7 if dtype == "fp16" else torch.nan)
    with pytest.raises(ModelError) as error:
        choose_packing(base, tiny_run.pairs(9), ROWS_OF_300, place)
    assert str(error.value) == sentence
    if dtype == "fp16":
        choose_packing(base, tiny_run.pairs(9), ROWS_OF_300, tiny_run.CPU)


def test_without_a_layout_a_model_for_rows_computes_as_before() -> None:
    base = architectures.made(architectures.CONFIGS["qwen2"])
    ids = torch.arange(3, 40)[None]
    before = base(input_ids=ids).logits
    attention.enable_packed_attention(base)
    assert torch.equal(base(input_ids=ids).logits, before)


def test_a_window_is_tried_on_a_pair_that_is_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    base = architectures.made(architectures.CONFIGS["a short window"])
    short = [
        pair for pair in tiny_run.pairs(60, longest_prompt=4, longest_answer=3) if pack.max_sequence_tokens(pair) <= 8
    ]
    packing, _ = choose_packing(base, [*short, *tiny_run.pairs(4)], ROWS_OF_300, tiny_run.CPU)
    assert packing.backend == "spans"
    plain = attention.packed_attention

    def without_window(*parts: Any, sliding_window: int | None = None, **more: Any) -> Any:
        return plain(*parts, **more)

    monkeypatch.setattr(attention, "packed_attention", without_window)
    assert choose_packing(base, short, ROWS_OF_300, tiny_run.CPU)[0].backend == "spans"
    packing, why = choose_packing(base, [*short, *tiny_run.pairs(4)], ROWS_OF_300, tiny_run.CPU)
    assert packing.backend is None
    assert "gives other log-probabilities than padded batches" in why
