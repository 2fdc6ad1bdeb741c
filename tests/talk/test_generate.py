"""Generation: greedy batches equal transformers' own, remembered replies equal fresh ones, characters come whole."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import varied_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.talk.generate import (
    Completion,
    KVCache,
    context_tokens,
    generate_greedy,
    generate_stream,
    stop_token_ids,
    tokenize_prompt,
)
from qlora_dpo.talk.sampling import SamplingParams, resolve_sampling_params

# PEFT asks transformers for a property by the name that transformers is about to drop

QUESTIONS = ["rice?", "How do I find a book about birds?", "Thank you", "What is the best way to sit on a mat?", "cat"]
PROMPTS = [[{"role": "user", "content": question}] for question in QUESTIONS]
GREEDY = SamplingParams(temperature=0, max_new_tokens=12, seed=0)
SAMPLED = SamplingParams(temperature=1.5, top_p=0.95, max_new_tokens=12, seed=7)


def with_adapter(model: tiny.Qwen2ForCausalLM) -> PeftModel:
    torch.manual_seed(1)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, adapter).eval()  # type: ignore[return-value]


def by_transformers(model: torch.nn.Module, prompt: list[dict[str, str]], ends: list[int], most: int) -> list[int]:
    """The tokens that transformers' own greedy search gives for one prompt by itself."""
    words = tiny.tokenizer()
    ids = torch.tensor([tokenize_prompt(words, prompt)])
    how = GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=ends, pad_token_id=words.pad_token_id)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)  # type: ignore[operator]
    return [int(token) for token in out[0, ids.shape[1] :]]


def expected(tokens: list[int], ends: list[int]) -> Completion:
    ended = tokens[-1] in ends
    said = tokens[:-1] if ended else tokens
    return Completion(tiny.tokenizer().decode(said, skip_special_tokens=True), len(said), ended)


@pytest.mark.parametrize("batch_tokens", [1, 100, 16_384])
def test_batched_greedy_answers_are_those_of_transformers_for_each_prompt_alone(batch_tokens: int) -> None:
    model, words = varied_model.qwen2(), tiny.tokenizer()
    # a token that some answers reach early and others do not, so that rows leave the batch at different steps
    alone = [by_transformers(model, prompt, [words.eos_token_id], 24) for prompt in PROMPTS]
    common = next(token for token in alone[0][3:] if sum(token in ids for ids in alone) < len(PROMPTS))
    ends = [words.eos_token_id, common]
    model.generation_config.eos_token_id = ends
    want = [expected(by_transformers(model, prompt, ends, 24), ends) for prompt in PROMPTS]
    assert generate_greedy(model, words, PROMPTS, 24, batch_tokens) == want
    assert {answer.ended for answer in want} == {True, False}
    assert len({answer.text for answer in want}) == len(want)


def test_answers_ignore_sampling_and_penalties_of_the_generation_config() -> None:
    model = varied_model.qwen2()
    plain = generate_greedy(model, tiny.tokenizer(), PROMPTS, 16)
    model.generation_config.update(do_sample=True, temperature=2.0, top_p=0.5, repetition_penalty=1.5)
    assert generate_greedy(model, tiny.tokenizer(), PROMPTS, 16) == plain


def test_answers_leave_training_mode_as_it_was_and_answer_without_dropout() -> None:
    model = with_adapter(varied_model.qwen2())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    quiet = generate_greedy(model, tiny.tokenizer(), PROMPTS, 8)
    assert generate_greedy(model.train(), tiny.tokenizer(), PROMPTS, 8) == quiet
    assert model.training


def test_no_prompts_give_no_answers() -> None:
    assert generate_greedy(tiny.qwen2(), tiny.tokenizer(), [], 8) == []


def test_answers_with_the_adapter_off_are_those_of_the_base() -> None:
    base = generate_greedy(varied_model.qwen2(), tiny.tokenizer(), PROMPTS, 8)
    model = with_adapter(varied_model.qwen2())
    assert generate_greedy(model, tiny.tokenizer(), PROMPTS, 8) != base
    with adapter_disabled(model):
        assert generate_greedy(model, tiny.tokenizer(), PROMPTS, 8) == base


def test_end_tokens_are_the_tokenizers_the_generation_configs_and_the_templates() -> None:
    model, words = tiny.qwen2(), tiny.tokenizer()
    words.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = [5, 6]
    names = {"<|endoftext|>", "<|im_end|>"}
    assert stop_token_ids(model, words) == {5, 6, *(words.convert_tokens_to_ids(name) for name in names)}


def test_a_template_that_ends_an_answer_with_plain_text_adds_no_end_token() -> None:
    model = tiny.qwen2()
    model.generation_config.eos_token_id = None
    words = tiny.tokenizer("{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}")
    assert stop_token_ids(model, words) == {words.eos_token_id}


def said(model: torch.nn.Module, ids: list[int], settings: SamplingParams, memory: KVCache) -> str:
    return "".join(generate_stream(model, tiny.tokenizer(), ids, settings, memory))


def test_streamed_greedy_reply_is_the_batched_answer() -> None:
    model, words = varied_model.qwen2(), tiny.tokenizer()
    streamed = [said(model, tokenize_prompt(words, prompt), GREEDY, KVCache()) for prompt in PROMPTS]
    assert streamed == [answer.text for answer in generate_greedy(model, words, PROMPTS, GREEDY.max_new_tokens)]


@pytest.fixture(params=["llama", "qwen2", "mistral with a sliding window"])
def any_model(request: pytest.FixtureRequest) -> torch.nn.Module:
    """Caches that can be cut back, and one that cannot."""
    torch.manual_seed(3)
    shape = {
        "vocab_size": len(tiny.tokenizer()),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
    match request.param:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**shape)).eval()
        case "qwen2":
            return varied_model.qwen2()
        case _:
            return MistralForCausalLM(MistralConfig(**shape, sliding_window=16)).eval()


def test_a_reply_from_memory_is_the_reply_without_it(any_model: torch.nn.Module) -> None:
    words, memory = tiny.tokenizer(), KVCache()
    history = [{"role": "user", "content": "rice?"}]
    for question in ("Thank you", "and the dog?", "How?"):
        fresh = said(any_model, tokenize_prompt(words, history), SAMPLED, KVCache())
        assert said(any_model, tokenize_prompt(words, history), SAMPLED, memory) == fresh
        history += [{"role": "assistant", "content": fresh}, {"role": "user", "content": question}]


def test_an_edited_history_is_answered_as_if_it_were_new(any_model: torch.nn.Module) -> None:
    words, memory = tiny.tokenizer(), KVCache()
    long = [
        {"role": "system", "content": "You are a cat."},
        {"role": "user", "content": "What is the best way to sit?"},
    ]
    said(any_model, tokenize_prompt(words, long), SAMPLED, memory)
    for edited in ([long[0], {"role": "user", "content": "What is rice?"}], PROMPTS[0], long):
        ids = tokenize_prompt(words, edited)
        assert said(any_model, ids, SAMPLED, memory) == said(any_model, ids, SAMPLED, KVCache())


def test_a_longer_conversation_runs_only_its_new_tokens() -> None:
    model, words, memory = varied_model.qwen2(), tiny.tokenizer(), KVCache()
    ids = tokenize_prompt(words, PROMPTS[1])
    ran: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: ran.append(given["input_ids"].shape[1]), with_kwargs=True)
    one_token = SamplingParams(temperature=0, max_new_tokens=1, seed=0)
    said(model, ids, one_token, memory)
    said(model, [*ids, 9, 8, 7], one_token, memory)
    said(model, [*ids, 9, 8, 7], one_token, memory)
    assert ran == [len(ids), 3, 1]


def test_a_stopped_reply_leaves_a_memory_that_still_answers_right() -> None:
    model, words, memory = varied_model.qwen2(), tiny.tokenizer(), KVCache()
    ids = tokenize_prompt(words, PROMPTS[1])
    reply = generate_stream(model, words, ids, SAMPLED, memory)
    next(reply), next(reply)
    reply.close()
    assert said(model, ids, SAMPLED, memory) == said(model, ids, SAMPLED, KVCache())


def test_a_forward_that_fails_half_way_leaves_an_empty_memory() -> None:
    model, words, memory = varied_model.qwen2(), tiny.tokenizer(), KVCache()
    ids = tokenize_prompt(words, PROMPTS[1])
    said(model, ids, SAMPLED, memory)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        said(model, [*ids, 9], SAMPLED, memory)
    hook.remove()
    assert said(model, [*ids, 9], SAMPLED, memory) == said(model, [*ids, 9], SAMPLED, KVCache())


def test_a_seed_repeats_a_reply_and_another_seed_does_not() -> None:
    model, ids = varied_model.qwen2(), tokenize_prompt(tiny.tokenizer(), PROMPTS[1])
    other = SamplingParams(temperature=1.5, top_p=0.95, max_new_tokens=12, seed=8)
    assert said(model, ids, SAMPLED, KVCache()) == said(model, ids, SAMPLED, KVCache())
    assert said(model, ids, SAMPLED, KVCache()) != said(model, ids, other, KVCache())


def test_a_top_p_close_to_0_is_greedy_at_any_temperature() -> None:
    model, ids = varied_model.qwen2(), tokenize_prompt(tiny.tokenizer(), PROMPTS[1])
    nucleus = SamplingParams(temperature=2.0, top_p=1e-6, max_new_tokens=12, seed=3)
    assert said(model, ids, nucleus, KVCache()) == said(model, ids, GREEDY, KVCache())


def parrot(tokens: list[int]) -> Iterator[str]:
    """Stream `tokens` through a model that says exactly these, whatever it is asked."""
    model = tiny.qwen2()
    said_by_now = iter(tokens)

    def dictate(module: object, given: object, logits: torch.Tensor) -> torch.Tensor:
        forced = torch.zeros_like(logits)
        forced[..., next(said_by_now)] = 1
        return forced

    model.lm_head.register_forward_hook(dictate)
    settings = SamplingParams(temperature=0, max_new_tokens=len(tokens), seed=0)
    return generate_stream(model, tiny.tokenizer(), [5], settings, KVCache())


def test_characters_of_several_tokens_come_whole() -> None:
    text = "naïve 🦜🏽 日本 e\u0301"
    tokens = tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]
    pieces = list(parrot(tokens))
    assert "".join(pieces) == tiny.tokenizer().decode(tokens) == "naïve 🦜🏽 日本 é"
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(tokens) > len(pieces) > 8


def test_half_a_character_at_the_very_end_is_shown_as_such() -> None:
    tokens = tiny.tokenizer()("a🦜", add_special_tokens=False)["input_ids"]
    assert list(parrot(tokens[:-1])) == ["a", "\ufffd"]


def test_bytes_that_are_no_character_do_not_stop_the_text() -> None:
    words = tiny.tokenizer()
    broken = words("🦜", add_special_tokens=False)["input_ids"][:2]
    after = words("ok", add_special_tokens=False)["input_ids"]
    assert "".join(parrot([*broken, *after])) == "\ufffdok"


def test_a_model_that_computes_no_numbers_is_a_sentence() -> None:
    model = tiny.qwen2()
    model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(ModelError) as caught:
        said(model, [5, 6], GREEDY, KVCache())
    assert str(caught.value) == "the model's output is not a number; its weights or its compute dtype are broken"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "this model's tokenizer has no chat template; take an instruction-tuned model to talk to"),
        (
            "{{ raise_exception('System role not supported') }}",
            "the model's chat template refuses this conversation: System role not supported",
        ),
    ],
)
def test_a_conversation_that_cannot_be_written_is_a_sentence(template: str | None, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        tokenize_prompt(tiny.tokenizer(template), PROMPTS[0])
    assert str(caught.value) == message


def test_context_is_the_models_number_of_positions() -> None:
    assert context_tokens(tiny.qwen2()) == 1024


def test_settings_are_the_users_then_the_models_then_the_defaults() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.6)
    assert resolve_sampling_params(config, None, {"temperature": None, "seed": 1}) == SamplingParams(0.6, 0.9, 512, 1)
    assert resolve_sampling_params(
        config, None, {"temperature": 0.0, "top_p": 0.5, "max_new_tokens": 7, "seed": 1}
    ) == SamplingParams(0.0, 0.5, 7, 1)
    assert resolve_sampling_params(GenerationConfig(), 600, {"seed": 1}) == SamplingParams(0.7, 0.9, 300, 1)


@pytest.mark.parametrize(
    ("name", "value", "used"),
    [
        ("temperature", 1e-6, "0"),
        ("temperature", -1, "0.7, the default"),
        ("temperature", 1e9, "0.7, the default"),
        ("temperature", float("nan"), "0.7, the default"),
        ("temperature", "hot", "0.7, the default"),
        ("top_p", 0, "0.9, the default"),
        ("top_p", 1.5, "0.9, the default"),
        ("top_p", True, "0.9, the default"),
    ],
)
def test_a_value_of_the_model_that_cannot_be_used_is_told_and_the_chat_starts(
    name: str, value: Any, used: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = SimpleNamespace(**{name: value})
    with caplog.at_level("INFO", "qlora_dpo"):
        found = getattr(resolve_sampling_params(config, None, {}), name)
    assert f"{found:g}" == used.partition(",")[0]
    assert caplog.messages == [f"the model's generation_config.json has {name} = {value!r}; used instead: {used}"]
    assert getattr(resolve_sampling_params(config, None, {name: 0.5}), name) == 0.5
    assert len(caplog.messages) == 1, "what the user gave is used, and the file's value does not matter"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0 (the likeliest token), or 0.01 to 100"),
        ({"temperature": float("nan")}, "temperature is nan; it must be 0 (the likeliest token), or 0.01 to 100"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1 (all tokens)"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
    ],
)
def test_a_setting_out_of_range_is_a_sentence(given: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        SamplingParams(**given)  # type: ignore[arg-type]
    assert str(caught.value) == message
