"""Keeps what became of pairs on disk, found by text and tokenizer, so that a second run tokenizes nothing."""

import hashlib
import json
from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import transformers
from safetensors import SafetensorError
from safetensors.numpy import load, save

from qlora_dpo.data.chat_format import ChatFormat
from qlora_dpo.data.encoded import EncodedPair, digest_ids
from qlora_dpo.data.pairs import Pair
from qlora_dpo.files import atomic_write, cache_home

TOKEN_CACHE_VERSION = 2
"""Goes up when the same pair would be encoded otherwise, so that no entry of an older version is used."""

EncodedOrReason = EncodedPair | str
"""A pair's ids, or the reason why it has none."""


@lru_cache(maxsize=4)
def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """All that decides how this tokenizer renders and tokenizes a chat; None if it cannot be told, or changes daily."""
    backend, template = getattr(tokenizer, "backend_tokenizer", None), tokenizer.chat_template
    if backend is None or not isinstance(template, str) or "strftime_now" in template:
        return None
    return json.dumps(
        [TOKEN_CACHE_VERSION, transformers.__version__, template, tokenizer.special_tokens_map, backend.to_str()]
    )


def token_cache_key(pairs: Sequence[Pair], tokenizer: Any, form: ChatFormat) -> str | None:
    """The name under which these pairs are kept; None if they are not to be."""
    told = tokenizer_fingerprint(tokenizer)
    if told is None:
        return None
    name = hashlib.sha256(told.encode())
    name.update(repr(form).encode())
    for pair in pairs:
        texts = [
            *(text for turn in pair.prompt for text in (turn["role"], turn["content"])),
            pair.chosen,
            pair.rejected,
            pair.tools,
        ]
        name.update(f"{list(map(len, texts))}{''.join(texts)}".encode())
    return name.hexdigest()


def load_tokens(key: str, pairs: Sequence[Pair]) -> list[EncodedOrReason] | None:
    """What became of `pairs`, in their order; None if it is not known or the file is damaged."""
    try:
        content = load((cache_home() / "encoded" / f"{key}.safetensors").read_bytes())
        reasons: list[str] = json.loads(content["reasons"].tobytes())
        lengths, ids, digests = content["lengths"].tolist(), content["ids"].tolist(), content["digests"]
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
    if not len(lengths) == len(reasons) == len(digests) == len(pairs):
        return None
    results: list[EncodedOrReason] = []
    at = 0
    for pair, reason, (prompt, chosen, rejected), own in zip(pairs, reasons, lengths, digests, strict=True):
        if reason:
            results.append(reason)
            continue
        cuts = list(accumulate((prompt, chosen, rejected), initial=at))
        parts = [tuple(ids[start:stop]) for start, stop in pairwise(cuts)]
        at = cuts[-1]
        if digest_ids(*parts) != own.tobytes():
            return None
        results.append(EncodedPair(parts[0], parts[1], parts[2], pair.row, own.tobytes()))
    return results


def store_tokens(key: str, results: Sequence[EncodedOrReason]) -> None:
    """Write what became of some pairs."""
    encoded = [result if isinstance(result, EncodedPair) else None for result in results]
    ids = array("i")
    for each in encoded:
        if each:
            ids.extend(each.prompt + each.chosen + each.rejected)
    lengths = [(len(each.prompt), len(each.chosen), len(each.rejected)) if each else (0, 0, 0) for each in encoded]
    digests = b"".join(each.digest if each else bytes(32) for each in encoded)
    reasons = json.dumps([result if isinstance(result, str) else "" for result in results]).encode()
    content: dict[str, Any] = {
        "ids": np.frombuffer(ids, dtype=np.int32),
        "lengths": np.array(lengths, dtype=np.int32).reshape(-1, 3),
        "digests": np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32),
        "reasons": np.frombuffer(reasons, dtype=np.uint8),
    }
    atomic_write(cache_home() / "encoded" / f"{key}.safetensors", save(content))
