"""Converts a tokenizer to GGUF: tokens, merges, token types, and the name of its pre-tokenizer."""

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
"""llama.cpp's names of pre-tokenizers, and their regular expressions."""


@dataclass(frozen=True)
class GgufTokenizer:
    """The tokenizer fields of a GGUF file. `pre_tokenizer` is llama.cpp's name of how text is split."""

    pre_tokenizer: str
    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    bos: int | None
    eos: int | None
    pad: int | None
    template: str | None


def convert_tokenizer(tokenizer: Any, rows: int, name: str) -> GgufTokenizer:
    """Convert the byte-level BPE `tokenizer`, padded to the `rows` of the embedding matrix.

    Raises ModelError for any other kind of tokenizer, and for a pre-tokenizer that llama.cpp has no name for.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: its tokenizer has no tokenizer.json; GGUF needs one")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece" if model.get("byte_fallback") else model["type"]
        raise ModelError(f"{name}: its tokenizer is of the kind {kind}; only byte-level BPE is written as GGUF here")
    pre_tokenizer = _pre_tokenizer_name(state["pre_tokenizer"] or {}, bool(model.get("ignore_merges")))
    normalizer = (state["normalizer"] or {"type": "NFC"})["type"]
    if pre_tokenizer is None or normalizer != "NFC":
        raise ModelError(f"{name}: its tokenizer splits or changes text in a way that has no name in GGUF")
    special = {token["content"]: bool(token["special"]) for token in state["added_tokens"]}
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if len(by_id) > rows:
        raise ModelError(f"{name}: its tokenizer has {len(by_id)} words and its embedding matrix {rows} rows")
    tokens = [by_id.get(token_id, f"[PAD{token_id}]") for token_id in range(rows)]
    return GgufTokenizer(
        pre_tokenizer=pre_tokenizer,
        tokens=tokens,
        token_types=[_token_type(token_id in by_id, special.get(token)) for token_id, token in enumerate(tokens)],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        template=tokenizer.chat_template,
    )


def _token_type(exists: bool, special: bool | None) -> int:
    if not exists:
        return int(TokenType.UNUSED)
    if special is None:
        return int(TokenType.NORMAL)
    return int(TokenType.CONTROL if special else TokenType.USER_DEFINED)


def _pre_tokenizer_name(pre: dict[str, Any], ignore_merges: bool) -> str | None:
    """llama.cpp's name of the pre-tokenizer `pre`; None if it has none."""
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
