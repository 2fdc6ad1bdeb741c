"""Answers of `chat`, `samples` and `pairs` against `transformers.generate` with the same model, in turn in one process.

    python benchmarks/answers.py MODEL PROMPTS.jsonl     # a model or adapter folder; any data whose prompts are asked

chat: the first prompt, greedily, token by token, each in a new conversation. samples: all prompts, greedily. pairs:
several sampled answers to each prompt. `generate` gets one prompt at a time, or all of them in one padded batch; of
sampled answers, one at a time or those of a prompt together. Both end an answer at the same tokens. With `--gguf FILE`,
what `export --quant q8_0` wrote, llama.cpp (xllamacpp, of the extra `engines`) is asked too, for orientation.
"""

import argparse
import json
import statistics
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

from qlora_dpo.adapter import OpenedModel, open_model
from qlora_dpo.cli.startup.quiet import quiet_libraries
from qlora_dpo.on_policy.prompts import AskedPrompt, collect_prompts
from qlora_dpo.talk.fused_decoder import fused_decoder
from qlora_dpo.talk.generate import (
    KVCache,
    TokenUsage,
    generate_greedy,
    generate_stream,
    sample_completions,
    stop_token_ids,
    tokenize_prompt,
)
from qlora_dpo.talk.sampling import SamplingParams

BATCH_TOKENS = 2**16
Variant = Callable[[], int]
"""Answers, and returns the number of tokens."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--only", default="chat,samples,pairs")
    parser.add_argument("--count", type=int, default=16, help="prompts")
    parser.add_argument("--samples", type=int, default=4, help="answers of `pairs` to each")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto", help="model.dtype: auto, fp32 or bf16")
    parser.add_argument("--against", default="", help='only the peers with this in their name: "batch"')
    asked = parser.parse_args()
    quiet_libraries()
    opened = open_model(str(asked.model), asked.dtype)
    opened.model.eval()
    prompts = collect_prompts(asked.prompts, "train", None, asked.count, 0)
    print(
        f"{asked.model.name}, {opened.device.compute_dtype}, {opened.device.name}; at most {asked.max_new_tokens} ",
        end="",
    )
    print(f"tokens, {asked.rounds} rounds; torch {torch.__version__}, transformers {transformers.__version__}")
    for kind in asked.only.split(","):
        variants = {"chat": chat, "samples": greedy, "pairs": sampled}[kind](opened, prompts, asked)
        variants = {name: answer for name, answer in variants.items() if name == kind or asked.against in name}
        with torch.inference_mode(), opened.device.autocast():
            measure(variants, asked.rounds)
    if asked.gguf is not None:  # last, since its idle threads slow down the others
        ids = [tokenize_prompt(opened.tokenizer, prompt.messages) for prompt in prompts]
        for name, of_kind in (("chat", ids[:1]), ("samples", ids)):
            measure({f"llama.cpp, as {name}": llama_cpp(asked, of_kind)}, asked.rounds)


def measure(variants: dict[str, Variant], rounds: int) -> None:
    """Run the variants in turn and print medians, without a first round that warms up: tokens, tokens/s, and how many
    times as long as the first variant they take.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    tokens: dict[str, int] = {}
    for _ in range(rounds + 1):
        for name, answer in variants.items():
            started = time.perf_counter()
            tokens[name] = answer()
            seconds[name].append((time.perf_counter() - started) / tokens[name])
    ours = next(iter(seconds.values()))[1:]
    for name, of_variant in seconds.items():
        ratios = [theirs / own for theirs, own in zip(of_variant[1:], ours, strict=True)]
        rate = 1 / statistics.median(of_variant[1:])
        print(f"| {name} | {tokens[name]} | {rate:.1f} | {statistics.median(ratios):.2f} |", flush=True)


def chat(opened: OpenedModel, prompts: list[AskedPrompt], asked: argparse.Namespace) -> dict[str, Variant]:
    """One reply, as `chat` and `serve` stream it; their decoder is built for the first reply of a session."""
    ids = tokenize_prompt(opened.tokenizer, prompts[0].messages)
    settings = SamplingParams(temperature=0, max_new_tokens=asked.max_new_tokens, seed=0)
    with opened.device.autocast():
        decoder = fused_decoder(opened.model)

    def ours() -> int:
        usage = TokenUsage()
        for _ in generate_stream(opened.model, opened.tokenizer, ids, settings, KVCache(), usage, lambda: decoder):
            pass
        return usage.completion_tokens

    return {"chat": ours, "generate": lambda: generated(opened, [ids], asked, do_sample=False)}


def greedy(opened: OpenedModel, prompts: list[AskedPrompt], asked: argparse.Namespace) -> dict[str, Variant]:
    """One answer to each prompt, as `samples`, `eval` and the end of a run write them."""
    ids = [tokenize_prompt(opened.tokenizer, prompt.messages) for prompt in prompts]
    messages = [prompt.messages for prompt in prompts]

    def ours() -> int:
        answers = generate_greedy(opened.model, opened.tokenizer, messages, asked.max_new_tokens)
        return sum(answer.tokens for answer in answers)

    return {
        "samples": ours,
        "generate, all in one batch": lambda: generated(opened, ids, asked, do_sample=False),
        "generate, one at a time": lambda: sum(generated(opened, [each], asked, do_sample=False) for each in ids),
    }


def sampled(opened: OpenedModel, prompts: list[AskedPrompt], asked: argparse.Namespace) -> dict[str, Variant]:
    """Several sampled answers to each prompt, as `pairs` writes them."""
    ids = [tokenize_prompt(opened.tokenizer, prompt.messages) for prompt in prompts]
    settings = SamplingParams(temperature=0.9, top_p=1.0, max_new_tokens=asked.max_new_tokens, seed=0)
    seeds, samples = [str(number) for number in range(len(ids))], asked.samples
    sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": 1.0, "top_k": 0}

    def ours() -> int:
        batches = sample_completions(opened.model, opened.tokenizer, ids, samples, settings, seeds, BATCH_TOKENS)
        return sum(answer.tokens for _, of_batch in batches for of_prompt in of_batch for answer in of_prompt)

    def together() -> int:
        return sum(generated(opened, [each], asked, num_return_sequences=samples, **sampling) for each in ids)

    def one_at_a_time() -> int:
        return sum(generated(opened, [each], asked, **sampling) for each in ids for _ in range(samples))

    return {
        "pairs": ours,
        "generate, a prompt at a time": together,
        "generate, one answer at a time": one_at_a_time,
    }


def llama_cpp(asked: argparse.Namespace, prompts: list[list[int]]) -> Variant:
    """One greedy answer to each prompt by llama.cpp, all at once."""
    import xllamacpp  # type: ignore[import-not-found]

    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.warmup = str(asked.gguf), len(prompts), False
    params.n_ctx = sum(len(ids) + asked.max_new_tokens for ids in prompts) * 2
    params.cpuparams.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)

    def answer(ids: list[int]) -> int:
        body = {"prompt": ids, "n_predict": asked.max_new_tokens, "temperature": 0, "cache_prompt": False}
        request = urllib.request.Request(
            f"{server.listening_address}/completion",
            json.dumps({**body, "return_tokens": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:
            return len(json.load(reply)["tokens"])

    def answers() -> int:
        with ThreadPoolExecutor(len(prompts)) as threads:
            return sum(threads.map(answer, prompts))

    return answers


def generated(opened: OpenedModel, prompts: list[list[int]], asked: argparse.Namespace, **sampling: Any) -> int:
    """The tokens of answers by `generate` to prompts in one batch, without end tokens."""
    stop_ids, pad = sorted(stop_token_ids(opened.model, opened.tokenizer)), opened.tokenizer.pad_token_id
    longest = max(map(len, prompts))
    found = opened.model.generate(  # type: ignore[operator]
        input_ids=torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
        max_new_tokens=asked.max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=pad,
        **sampling,
    )
    ends = torch.tensor([*stop_ids, pad])
    return int(torch.isin(found[:, longest:], ends, invert=True).sum())


if __name__ == "__main__":
    main()
