"""Loads the tokenizer of a base, and sees to it that it splits texts as the model's own file says."""

import logging
import math
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from qlora_dpo.errors import ModelError, first_line
from qlora_dpo.files import cached_record_path, file_sha256, read_cached_record, write_cached_record
from qlora_dpo.model.sources import ModelSource

logger = logging.getLogger(__name__)

SPLIT_TEXTS = (
    "Hello, world!  It's 12345.67 at 2 a.m.; WE'LL see: (x**2) != y_1\n\n\tdef f(x):\r\n    return -x  \n",
    "na\u00efve cafe\u0301 \u00c5ngstr\u00f6m \ufb01 \u4f60\u597d\uff0c\u4e16\u754c\u3002 "
    "\u043f\u0440\u0438\u0432\u0435\u0442 \U0001f44d\U0001f3fd \u00a0\u200b",
    " a leading space, and\u2581a mark",
)
"""Texts in which normalizers and splitting rules differ: spaces, digits, contractions, accents, other scripts."""
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files beside tokenizer.json that decide how transformers rebuilds a tokenizer."""


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer; if it has no padding token, the end-of-sequence token takes its place.

    transformers builds the tokenizer of a known class from the vocabulary in tokenizer.json alone. Where that splits
    texts in another way than tokenizer.json says, which other programs follow, the file is used as it is.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
        if _differs_from_file(tokenizer, source.folder / "tokenizer.json"):
            logger.info(
                f"{source.name}: tokenizer.json is used as it is; transformers' {type(tokenizer).__name__} would split "
                "texts in another way"
            )
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source.folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{source.name}: its tokenizer cannot be loaded: {first_line(error)}") from error
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = _default_template(tokenizer.chat_template, source)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= _vocab_size(source):
        tokenizer.pad_token = tokenizer.eos_token
    result: PreTrainedTokenizerBase = tokenizer
    return result


def _differs_from_file(tokenizer: Any, file: Path) -> bool:
    """Whether a tokenizer that transformers has rebuilt splits SPLIT_TEXTS in another way than its own file says.

    A large file takes half a second to read a second time, so what was found is kept for these files and libraries.
    """
    if type(tokenizer) is PreTrainedTokenizerFast or not file.is_file():
        return False
    beside = [file.with_name(name) for name in TOKENIZER_FILES]
    digests = [file_sha256(each) for each in (file, *beside) if each.is_file()]
    key = [type(tokenizer).__name__, SPLIT_TEXTS, digests]
    place = cached_record_path("tokenizers", key, ["transformers", "tokenizers"])
    kept = read_cached_record(place)
    if kept is None:
        kept = {"differs": _splits_differently(tokenizer, Tokenizer.from_file(str(file)))}
        write_cached_record(place, kept)
    return bool(kept["differs"])


def _splits_differently(tokenizer: Any, as_written: Tokenizer) -> bool:
    try:
        rebuilt_ids = [tokenizer.encode(text, add_special_tokens=False) for text in SPLIT_TEXTS]
    except Exception:  # what `tokenizers` raises for a token that the class expects and the vocabulary lacks
        return True
    return rebuilt_ids != [as_written.encode(text, add_special_tokens=False).ids for text in SPLIT_TEXTS]


def _default_template(templates: dict[str, str], source: ModelSource) -> str:
    """The chat template called "default" of several named ones, as Hermes and Command R have."""
    if "default" not in templates:
        raise ModelError(
            f"{source.name}: has several chat templates ({', '.join(sorted(templates))}) and none is called default; "
            "write the one to use into chat_template.jinja of a copy of the model folder, and name that"
        )
    return templates["default"]


def _vocab_size(source: ModelSource) -> float:
    """Embeddings that the config promises; infinity in a folder without a config, such as an adapter's."""
    config = source.read_config()
    size = (config.get("text_config") or config).get("vocab_size") or config.get("vocab_size")
    return size if isinstance(size, int) else math.inf
