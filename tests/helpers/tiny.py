"""A small ChatML tokenizer and a random small Qwen2, both made in under a second and the same on every machine."""

import functools

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CORPUS = (
    "The cat sat on the mat and the dog ran after the ball in the garden.",
    "You are a helpful assistant. system user assistant",
    "How do I learn to cook rice? Rinse it, add water, bring it to the boil and wait ten minutes.",
    "What is the best way to find a book about birds? Ask the people who work at the library.",
    "I can't help with that, but I can tell you where to find someone who can.",
    "Thank you very much, that is what I wanted to know about this and that and other things.",
    "One way.\n\n\n\nAnother way.\n\n\n\nNo way.\n\n\n\n",
)

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@functools.cache
def _trained() -> str:
    """The tokenizer's JSON: byte-level BPE, 256 bytes, 141 merges of CORPUS and Qwen2's three special tokens."""
    fast = Tokenizer(models.BPE())
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(CORPUS, trainer)
    return str(fast.to_str())


def tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A fresh tokenizer that writes chats as Qwen2 does; every text survives encoding and decoding."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    made.chat_template = chat_template
    return made


def qwen2(vocab_size: int | None = None, seed: int = 0) -> Qwen2ForCausalLM:
    """A random float32 Qwen2: width 64, 2 layers, 4 heads on 2 key-value heads, tied embeddings, in eval mode."""
    words = tokenizer()
    config = Qwen2Config(
        vocab_size=vocab_size or len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.eval()
    return model
