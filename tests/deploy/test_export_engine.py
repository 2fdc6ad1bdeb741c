"""llama.cpp, an engine that shares no code with us, reads what `export` wrote and says what transformers says.

Needs the extra `engines`, and real models in folders that QLORA_DPO_TEST_MODELS names, one after another with colons.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_dpo.cli import main

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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODELS, reason="QLORA_DPO_TEST_MODELS names no models"),
]


def asked(file: Path, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """The engine's greedy tokens after each prompt, and its tokens of TEXTS; a process of its own, for it may crash."""
    pytest.importorskip("xllamacpp", reason="needs the extra: pip install -e '.[engines]'")
    question = {"file": str(file), "prompts": prompts, "tokens": TOKENS, "texts": TEXTS}
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
