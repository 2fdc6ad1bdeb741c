"""What the benchmarks on a GPU work on, all of it generated: random models, their tokenizer, rows and recipes."""

import functools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from qlora_dpo.data.encoded import EncodedPair, digest_ids
from qlora_dpo.model.sources import ModelSource

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = [first + second for first in ("ba", "de", "fi", "go", "lu", "me", "no", "ri", "sa", "tu") for second in
         ("k", "l", "m", "n", "p", "r", "s", "t", "v", "z")]  # fmt: skip
KIND, CURT = WORDS[:50], WORDS[50:]
"""Words of chosen and of rejected answers, so that there is something to learn."""

COMMON: dict[str, Any] = {
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "0.5b": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "1.5b": {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7b": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
"""Qwen2's shapes by their names, and one for a trial on a CPU."""


@functools.cache
def _words() -> str:
    """The tokenizer's JSON: byte-level BPE in which each of WORDS is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([f" {word}" for word in (*WORDS, "user", "assistant")] * 2, trainer)
    return str(bpe.to_str())


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that writes chats as Qwen2 does and knows 100 invented words."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_words()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=32_768,
    )
    made.chat_template = CHATML
    return made


def source(work: Path, shape: str) -> ModelSource:
    """The random model of this shape, made in `work` unless it lies there already; the same in every run."""
    folder = work / shape
    if not (folder / "config.json").is_file():
        _model(shape).save_pretrained(folder, max_shard_size="5GB")
        tokenizer().save_pretrained(folder)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    name = "a tiny Qwen2" if shape == "tiny" else f"Qwen2's {shape.upper()} shape"
    return ModelSource(f"{name}, random weights", folder)


def _model(shape: str) -> Any:
    """A random bf16 Qwen2 that says words it can write; made on the GPU if it fits there, as a CPU takes minutes."""
    config = Qwen2Config(**SHAPES[shape], **COMMON)
    torch.manual_seed(0)
    with torch.device(_place_for(config)):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
        # most of the vocabulary stands for nothing, as in the real one: its logits stay 0
        model.get_input_embeddings().weight[len(tokenizer()) :] = 0
        model.get_output_embeddings().weight[len(tokenizer()) :] = 0
    return model


def _place_for(config: Qwen2Config) -> str:
    if not torch.cuda.is_available():
        return "cpu"
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    weights = config.num_hidden_layers * (3 * width * inner + 4 * width * width) + 2 * vocabulary * width
    return "cuda" if 3 * weights < torch.cuda.mem_get_info()[0] else "cpu"


def pairs(count: int, longest: int, *, full: bool = False, seed: int = 0) -> list[EncodedPair]:
    """Random ids; lengths as HH's in Qwen2 tokens (medians: prompt 102, answers 50), or as long as may be if `full`."""
    draw = random.Random(seed)

    def ids(length: float) -> tuple[int, ...]:
        return tuple(draw.randrange(6, 350) for _ in range(max(1, int(length))))

    made = []
    for row in range(count):
        prompt = ids(longest / 2) if full else ids(min(longest / 2, draw.lognormvariate(4.6, 0.8)))
        room = longest - len(prompt)
        chosen, rejected = (ids(room) if full else ids(min(room, draw.lognormvariate(3.9, 0.8))) for _ in range(2))
        made.append(EncodedPair(prompt, chosen, rejected, row, digest_ids(prompt, chosen, rejected)))
    return made


def rows(file: Path, count: int, longest: int, *, seed: int = 0) -> Path:
    """Write `count` rows of text of at most about `longest` tokens, HH-like in length; chosen and rejected answers use
    other words.
    """
    draw = random.Random(seed)

    def text(words: list[str], length: float) -> str:
        return " ".join(draw.choices(words, k=max(3, int(length))))

    lines = []
    for _ in range(count):
        asked = min(longest / 2 - 16, draw.lognormvariate(4.6, 0.8))
        room = longest / 2 - 8
        chosen, rejected = (text(kind, min(room, draw.lognormvariate(3.9, 0.8))) for kind in (KIND, CURT))
        lines.append(json.dumps({"prompt": text(WORDS, asked), "chosen": chosen, "rejected": rejected}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def recipe(file: Path, base: Path, longest: int, **tables: Mapping[str, Any]) -> Path:
    """Write a recipe for the model in `base` on generated rows beside it; `tables` are laid over it."""
    values: dict[str, dict[str, Any]] = {
        "model": {"name": str(base.resolve()), "quantization": "nf4"},
        "data": {
            "train": str(rows(file.with_suffix(".train.jsonl"), 480, longest).resolve()),
            "eval": str(rows(file.with_suffix(".eval.jsonl"), 24, longest, seed=1).resolve()),
            "max_length": longest,
        },
        "train": {"batch_size": 16, "learning_rate": 2e-4, "logging_steps": 1, "eval_steps": 15, "save_steps": 10},
        "samples": {"prompts": 2, "max_new_tokens": 16},
    }
    for name, table in tables.items():
        values[name] = {**values.get(name, {}), **table}
    text = "".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for name, table in values.items()
    )
    file.write_text(text, encoding="utf-8")
    return file
