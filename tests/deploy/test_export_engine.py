"""llama.cpp, an engine that shares no code with us, reads what `export` wrote and says what transformers says.

Needs the extra `engines`. Tiny models of all families are asked, and real models in the folders that
QLORA_DPO_TEST_MODELS names, one after another with colons.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import architectures
import gguf_models
import pytest
import saved_adapters
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_dpo.adapter import open_adapter
from qlora_dpo.cli import main
from qlora_dpo.deploy.engine_chats import check_engine_chats
from qlora_dpo.errors import ModelError

MODELS = [Path(each) for each in os.environ.get("QLORA_DPO_TEST_MODELS", "").split(":") if each]
TOKENS = 40
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "How do I boil an egg?",
    "Explain photosynthesis in one sentence.",
    "Name 3 fruits that are red.",
    "What is 12 + 30?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Give me a name for a cat.",
    "Who wrote Romeo and Juliet?",
)
TEXTS = (*QUESTIONS, "naïve café – 東京 🙂", "  two  spaces\n\n\ttab 1234567 it's", "def f(x):\n    return x**2 # ok")

ENGINE = """
import json, os, sys, urllib.request
import xllamacpp
question = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path = question["file"]
params.n_ctx, params.n_parallel, params.warmup = 2048, 1, False
params.cpuparams.n_threads = 1
if question["lora"]:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(question["lora"], 1.0)]
server = xllamacpp.Server(params)
def ask(place, **body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(server.listening_address + place, data, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))["tokens"]
greedy = {"n_predict": question["tokens"], "temperature": 0, "return_tokens": True, "cache_prompt": False}
told = [ask("/completion", prompt=prompt, **greedy) for prompt in question["prompts"]]
words = [ask("/tokenize", content=text, parse_special=False) for text in question["texts"]]
print("TOLD" + json.dumps([told, words]), flush=True)
os._exit(0)
"""

pytestmark = pytest.mark.slow


def asked(
    file: Path, prompts: list[list[int]], count: int = TOKENS, lora: Path | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """The engine's greedy tokens after each prompt, and its tokens of TEXTS; a process of its own, for it may crash."""
    pytest.importorskip("xllamacpp", reason="needs the extra: pip install -e '.[engines]'")
    question = {"file": str(file), "prompts": prompts, "tokens": count, "texts": TEXTS, "lora": str(lora or "")}
    done = subprocess.run(
        [sys.executable, "-c", ENGINE], input=json.dumps(question), capture_output=True, text=True, check=False
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("TOLD")), None)
    assert line is not None, done.stderr[-2000:]
    told, words = json.loads(line.removeprefix("TOLD"))
    return told, words


def greedy(model: Any, ids: list[int], ends: set[int]) -> list[int]:
    """The likeliest tokens up to one that ends the answer, which is left out."""
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, repetition_penalty=1.0, eos_token_id=list(ends)
    )[0, len(ids) :].tolist()
    return out[:-1] if out[-1] in ends else out


@pytest.mark.skipif(not MODELS, reason="QLORA_DPO_TEST_MODELS names no models")
@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_the_engine_answers_as_the_model_and_8_bits_are_sane(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True).input_ids
        for text in QUESTIONS
    ]
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")}
    wanted = [greedy(model, ids, ends) for ids in prompts]
    found: dict[str, list[list[int]]] = {}
    for quant in ("f16", "q8_0"):
        assert main(["export", str(folder), "--quant", quant, "-o", str(tmp_path / quant)]) == 0
        told, words = asked(next((tmp_path / quant).glob("*.gguf")), prompts)
        found[quant] = [[token for token in each if token not in ends] for each in told]
        assert words == [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    same = [mine == theirs for mine, theirs in zip(wanted, found["f16"], strict=True)]
    print(folder.name, "f16:", sum(same), "of", len(same), "answers alike")
    assert sum(same) >= 9
    first = [mine[:3] == theirs[:3] for mine, theirs in zip(wanted, found["q8_0"], strict=True)]
    print(folder.name, "q8_0:", sum(first), "of", len(first), "begin alike")
    assert sum(first) >= 7


def assert_likeliest(model: Any, prompt: list[int], answer: list[int]) -> None:
    """Each token is the likeliest after those before it; one that is as likely but for rounding will do."""
    with torch.no_grad():
        logits_LV = model(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    behind_L = logits_LV.max(-1).values - logits_LV.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert (behind_L < 0.02 * logits_LV.std(-1)).all(), behind_L


@pytest.mark.parametrize("name", gguf_models.EXPORTED)
def test_a_tiny_model_of_every_family_says_what_transformers_says(name: str, tmp_path: Path) -> None:
    folder = gguf_models.save_gguf_model(name, tmp_path / "model")
    assert main(["export", str(folder), "-o", str(tmp_path / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 390, (length,), generator=generator).tolist() for length in (5, 20, 60)]
    told, _ = asked(next((tmp_path / "out").glob("*.gguf")), prompts, 10)
    for prompt, answer in zip(prompts, told, strict=True):
        assert len(answer) == 10
        assert_likeliest(model, prompt, answer)


@pytest.mark.parametrize("name", ["Llama 2", "Qwen3", "Gemma 3", "Phi-3"])
def test_an_adapter_beside_its_base_says_what_transformers_says(name: str, tmp_path: Path) -> None:
    folder = gguf_models.save_gguf_model(name, tmp_path / "base")
    adapter = saved_adapters.save_adapter(tmp_path / "tuned", folder, "none")
    assert main(["export", str(folder), "-o", str(tmp_path / "out")]) == 0
    assert main(["export", str(adapter), "--to", "gguf-lora", "-o", str(tmp_path / "lora")]) == 0
    base, lora = (next((tmp_path / each).glob("*.gguf")) for each in ("out", "lora"))
    model = open_adapter(adapter, "fp32").model
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 390, (length,), generator=generator).tolist() for length in (5, 20, 60)]
    told, _ = asked(base, prompts, 10, lora)
    for prompt, answer in zip(prompts, told, strict=True):
        assert_likeliest(model, prompt, answer)
    assert told != asked(base, prompts, 10)[0]


@pytest.mark.parametrize("kind", ["prepended", "replaced", "metaspace"])
def test_the_engine_has_the_tokens_of_sentencepiece(kind: Any, tmp_path: Path) -> None:
    words = gguf_models.sentencepiece(kind)
    config = gguf_models.gguf_config("Mistral", vocab_size=len(words), bos_token_id=1, eos_token_id=4)
    architectures.made(config).save_pretrained(tmp_path / "m")
    words.save_pretrained(tmp_path / "m")
    assert main(["export", str(tmp_path / "m"), "-o", str(tmp_path / "out")]) == 0
    _, tokens = asked(next((tmp_path / "out").glob("*.gguf")), [[5, 6]], 1)
    # a text behind a special token, which every chat begins with
    mark = words.convert_tokens_to_ids("<|im_start|>")
    behind = [words(f"<|im_start|>{text}", add_special_tokens=False).input_ids for text in TEXTS]
    assert {ids[0] for ids in behind} == {mark}
    assert tokens == [ids[1:] for ids in behind]


def test_twenty_chats_by_the_files_own_template_have_the_tokens_of_training(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="needs the extra: pip install -e '.[engines]'")
    words = gguf_models.sentencepiece("replaced")
    config = gguf_models.gguf_config("Mistral", vocab_size=len(words), bos_token_id=1, eos_token_id=4)
    architectures.made(config).save_pretrained(tmp_path / "m")
    words.save_pretrained(tmp_path / "m")
    assert main(["export", str(tmp_path / "m"), "-o", str(tmp_path / "out")]) == 0
    file = next((tmp_path / "out").glob("*.gguf"))
    assert json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))["chats"]["compared"] == 20
    words.chat_template = tiny.CHATML.replace("<|im_end|>\\n", "<|im_end|>\\n\\n")
    with pytest.raises(ModelError, match=r"in \d+ of 20 chats llama.cpp has other tokens .* nothing was kept"):
        check_engine_chats(file, words)
    words.chat_template = tiny.CHATML
    prompt = [{"role": "user", "content": "Is it late?"}]
    ids = tuple(words.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
    held_out = check_engine_chats(file, words, [(prompt, ids)])
    assert (held_out.compared, held_out.kind) == (1, "held-out")
    with pytest.raises(ModelError, match=r"in 1 of 1 chats llama.cpp has other tokens .*: token 3 is"):
        check_engine_chats(file, words, [(prompt, (*ids[:2], 7, *ids[3:]))])
    words.chat_template = None
    assert check_engine_chats(file, words).not_compared == "the model has no chat template"
