"""Small tokenizers that differ as those of real models do: start tokens, padding, ends, system turns, word starts."""

import functools
import json
from collections.abc import Callable

import tiny
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim"
    " + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '</s>' }}"
    "{% elif m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST] ' }}{% endif %}{% endfor %}"
)


def qwen2() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


def smollm2() -> PreTrainedTokenizerFast:
    """Digits by themselves, no normalizer, and an unknown token that is a control token."""
    template = tiny.CHATML.replace("You are a helpful assistant.", "You are a helpful AI assistant named SmolLM.")
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return _made(
        tiny.SPECIAL, template, pre_tokenizers.Sequence(digits), eos="<|im_end|>", unk="<|endoftext|>", pad="<|im_end|>"
    )


def with_bos() -> PreTrainedTokenizerFast:
    """As Llama 3: a start token that tokenizer and template both write, and headers of control tokens."""
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
    splits = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    words = [
        pre_tokenizers.Split(Regex(splits), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    made = _made(
        special, LLAMA, pre_tokenizers.Sequence(words), eos="<|eot_id|>", bos="<|begin_of_text|>", pad="<|end_of_text|>"
    )
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", made.bos_token_id)]
    )
    return made


def without_pad() -> PreTrainedTokenizerFast:
    made = tiny.tokenizer()
    made.pad_token = None
    return made


def without_eos() -> PreTrainedTokenizerFast:
    made = tiny.tokenizer()
    made.eos_token = None
    return made


def without_system() -> PreTrainedTokenizerFast:
    """As Gemma 2: the template refuses a system turn."""
    special = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<pad>"]
    return _made(special, GEMMA, eos="<end_of_turn>", bos="<bos>", pad="<pad>")


def with_word_starts() -> PreTrainedTokenizerFast:
    """As Llama 2: words begin with a mark, also the first of a text, and the template leaves system turns out."""
    marks = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = marks
    special = ["<unk>", "<s>", "</s>"]
    trained.train_from_iterator(
        tiny.CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    merges = [tuple(each) for each in model["merges"]]
    fast = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    fast.pre_tokenizer = marks
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    fast.add_special_tokens(special)
    made = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = LLAMA_2
    return made


def _made(
    special: list[str],
    template: str,
    words: pre_tokenizers.PreTokenizer | None = None,
    eos: str | None = None,
    bos: str | None = None,
    pad: str | None = None,
    unk: str | None = None,
) -> PreTrainedTokenizerFast:
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = words or pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(tiny.CORPUS, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token=eos,
        bos_token=bos,
        pad_token=pad,
        unk_token=unk,
        additional_special_tokens=[each for each in special if each not in (eos, bos, pad, unk)],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template
    return made


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    each.__name__: functools.cache(each)
    for each in (qwen2, smollm2, with_bos, without_pad, without_eos, without_system, with_word_starts)
}
