"""Converts a tokenizer to GGUF: tokens, merges, token types, and the name of its pre-tokenizer."""

import json
import re
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from qlora_dpo.data.templates.chat_format import detect_chat_format
from qlora_dpo.errors import ModelError

_WORD_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_WORD_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZER_PATTERNS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": rf"{_WORD_LOWER}|{_WORD_UPPER}|\p{{N}}|{_SYMBOLS}",
    "gpt-4o": rf"{_WORD_LOWER}{_SUFFIX}|{_WORD_UPPER}{_SUFFIX}|\p{{N}}{{1,3}}|{_SYMBOLS}",
}
"""llama.cpp's names of pre-tokenizers, and their regular expressions."""
IGNORE_MERGES = ("llama-bpe", "tekken")
"""Those with which a word that is a token is that token, whatever its merges would give."""


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
    end_of_turn: int | None = None
    """The token that ends an answer in the chat template, if it is not `eos`: engines must stop at both."""
    unk: int | None = None
    scores: list[float] | None = None
    """Of SentencePiece's tokens, from which llama.cpp merges the highest first; None for byte-level BPE."""
    adds_space: bool = False
    """True if a space stands before each text behind a special token, as in Llama 2."""


def convert_tokenizer(tokenizer: Any, rows: int, name: str) -> GgufTokenizer:
    """Convert the `tokenizer`, byte-level BPE or SentencePiece's, padded to the `rows` of the embedding matrix.

    Raises ModelError for any other kind of tokenizer, and for a pre-tokenizer that llama.cpp has no name for.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: its tokenizer has no tokenizer.json; GGUF needs one")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"{name}: its tokenizer is of the kind {model['type']}; byte-level BPE and SentencePiece's BPE are written"
        )
    is_sentencepiece = bool(model.get("byte_fallback"))
    if is_sentencepiece:
        adds_space = _adds_space(state)
        pre_tokenizer = None if adds_space is None else "default"
    else:
        pre_tokenizer = _pre_tokenizer_name(state["pre_tokenizer"] or {}, bool(model.get("ignore_merges")))
        adds_space = False if (state["normalizer"] or {"type": "NFC"})["type"] == "NFC" else None
    if pre_tokenizer is None or adds_space is None:
        raise ModelError(f"{name}: its tokenizer splits or changes text in a way that has no name in GGUF")
    special = {token["content"]: bool(token["special"]) for token in state["added_tokens"]}
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if len(by_id) > rows:
        raise ModelError(f"{name}: its tokenizer has {len(by_id)} words and its embedding matrix {rows} rows")
    tokens = [by_id.get(token_id, f"[PAD{token_id}]") for token_id in range(rows)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    types = [_token_type(token_id in by_id, special.get(token)) for token_id, token in enumerate(tokens)]
    if is_sentencepiece:
        types = [_byte_or(kind, token, tokenizer.unk_token) for kind, token in zip(types, tokens, strict=True)]
    return GgufTokenizer(
        pre_tokenizer=pre_tokenizer,
        tokens=tokens,
        token_types=types,
        merges=[] if is_sentencepiece else merges,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        template=tokenizer.chat_template,
        end_of_turn=_end_of_turn(tokenizer),
        unk=tokenizer.unk_token_id if is_sentencepiece else None,
        scores=_merge_scores(tokens, merges) if is_sentencepiece else None,
        adds_space=adds_space,
    )


def _end_of_turn(tokenizer: Any) -> int | None:
    """The end token of the chat template's answers; None if it is the tokenizer's own, or is not known."""
    if tokenizer.chat_template is None:
        return None
    try:
        end = detect_chat_format(tokenizer).end_token_id
    except ModelError:  # a template that cannot be trained with here may still be exported
        return None
    return end if end != tokenizer.eos_token_id else None


def _merge_scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece's scores, up to their size: the earlier a token's first merge, the higher; others are lowest."""
    ranks = dict[str, int]()
    for merge in merges:
        ranks.setdefault(merge.replace(" ", ""), len(ranks))
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _adds_space(state: dict[str, Any]) -> bool | None:
    """Whether SentencePiece's space is put before each text; None for a tokenizer that changes text in another way."""
    normalizer, pre = state["normalizer"] or {"type": "Sequence", "normalizers": []}, state["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    prepends = [step for step in steps if step == {"type": "Prepend", "prepend": "\u2581"}]
    replaces = [step for step in steps if step["type"] == "Replace" and step["content"] == "\u2581"]
    if len(prepends) + len(replaces) < len(steps):
        return None
    match pre.get("type"):
        case "Metaspace" if pre.get("replacement") == "\u2581" and not pre.get("split", True):
            return bool(pre.get("prepend_scheme") == "always")
        case None | "Split" if replaces:  # Gemma splits at spaces, of which the normalizer leaves none
            return bool(prepends)
    return None


def _byte_or(kind: int, token: str, unknown: str | None) -> int:
    """The type of one of SentencePiece's tokens: a byte, the unknown token, or `kind`."""
    if token == unknown:
        return int(TokenType.UNKNOWN)
    return int(TokenType.BYTE) if _BYTE.fullmatch(token) else kind


_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


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
            return None if (name in IGNORE_MERGES) != ignore_merges else name
    return None
