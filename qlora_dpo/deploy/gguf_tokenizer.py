"""A tokenizer in GGUF's terms: words, merges, kinds of tokens, and the name of the way it splits text."""

import json
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from qlora_dpo.errors import ModelError

PRE_TOKENIZER_PATTERNS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""The expressions that llama.cpp knows by these names."""


@dataclass(frozen=True)
class GgufTokenizer:
    """What a GGUF file says of its tokenizer."""

    split: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    bos: int | None
    eos: int | None
    pad: int | None
    template: str | None


def convert_tokenizer(tokenizer: Any, rows: int, name: str) -> GgufTokenizer:
    """The byte-level BPE `tokenizer`, filled up to the `rows` of the embedding matrix.

    Raises ModelError for any other kind, and for a way to split text that GGUF has no name for.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: its tokenizer has no tokenizer.json; GGUF needs one")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece" if model.get("byte_fallback") else model["type"]
        raise ModelError(f"{name}: its tokenizer is of the kind {kind}; only byte-level BPE is written as GGUF here")
    split = _split_name(state["pre_tokenizer"] or {}, bool(model.get("ignore_merges")))
    normalizer = (state["normalizer"] or {"type": "NFC"})["type"]
    if split is None or normalizer != "NFC":
        raise ModelError(f"{name}: its tokenizer splits or changes text in a way that has no name in GGUF")
    special = {each["content"]: bool(each["special"]) for each in state["added_tokens"]}
    by_id = {number: word for word, number in tokenizer.get_vocab().items()}
    if len(by_id) > rows:
        raise ModelError(f"{name}: its tokenizer has {len(by_id)} words and its embedding matrix {rows} rows")
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(rows)]
    return GgufTokenizer(
        split=split,
        tokens=tokens,
        kinds=[_kind(number in by_id, special.get(word)) for number, word in enumerate(tokens)],
        merges=[each if isinstance(each, str) else " ".join(each) for each in model["merges"]],
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        template=tokenizer.chat_template,
    )


def _kind(exists: bool, special: bool | None) -> int:
    if not exists:
        return int(TokenType.UNUSED)
    if special is None:
        return int(TokenType.NORMAL)
    return int(TokenType.CONTROL if special else TokenType.USER_DEFINED)


def _split_name(pre: dict[str, Any], ignore_merges: bool) -> str | None:
    """llama.cpp's name for how `pre` splits text; None if it has none."""
    parts = pre.get("pretokenizers", [pre])
    match [part.get("type") for part in parts]:
        case ["ByteLevel"] if parts[0]["use_regex"] and not parts[0]["add_prefix_space"]:
            return "gpt-2"
        case ["Digits", "ByteLevel"] if parts[0]["individual_digits"] and parts[1]["use_regex"]:
            return "smollm"
        case ["Split", "ByteLevel"] if not parts[1]["use_regex"]:
            expression = parts[0]["pattern"].get("Regex")
            name = next((name for name, known in PRE_TOKENIZER_PATTERNS.items() if known == expression), None)
            return None if (name == "llama-bpe") != ignore_merges else name
    return None
