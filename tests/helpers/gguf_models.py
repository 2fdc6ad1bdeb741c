"""Tiny random models of every family that is written as GGUF, as llama.cpp expects them, and SentencePiece's tokens."""

import json
from pathlib import Path
from typing import Any, Literal

import architectures
import tiny
from model_families import FAMILIES, Family
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EXPORTED = (
    *("Llama 2", "Llama 3.1, 3.2", "Mistral", "Qwen2, Qwen2.5", "Qwen3", "Qwen3-MoE", "SmolLM3", "Gemma 3", "Phi-3"),
    *("Phi-4-mini", "Granite 3"),
)
"""By the names of `model_families`."""


def gguf_config(name: str, **changed: Any) -> Any:
    """The config of a family that can be exported, or with `changed` keys one that cannot."""
    family = next(family for family in FAMILIES if family.name == name)
    return Family(family.name, family.kind, {**family.keys, **changed}).config()


def save_gguf_model(name: str, folder: Path) -> Path:
    """A random model of the family with the tests' tokenizer."""
    architectures.made(gguf_config(name)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


SpaceKind = Literal["prepended", "replaced", "metaspace"]


def sentencepiece(kind: SpaceKind) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE as Llama 2 ("prepended"), Gemma ("replaced") or Mistral 0.3 ("metaspace") has it."""
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*special, *bytes_], show_progress=False)
    trained.train_from_iterator(tiny.CORPUS, trainer)
    state = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = state["vocab"]
    merged = dict.fromkeys("".join(merge) for merge in state["merges"])
    # SentencePiece merges any two tokens that make a third: every way to split a token is a merge
    merges = [
        (token[:cut], token[cut:])
        for token in merged
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    match kind:
        case "prepended":
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        case "replaced":
            made.normalizer = normalizers.Replace(" ", "▁")
            made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        case "metaspace":
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="</s>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = tiny.CHATML
    return fast
