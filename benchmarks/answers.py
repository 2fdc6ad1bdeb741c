"""Sampled answers per second: many prompts and samples in batches against `transformers.generate`, asked one at a time.

    python benchmarks/answers.py MODEL PROMPTS.jsonl      # a model folder, and any data whose prompts are asked

Every round has both answer the same prompts with the same dense weights, dtype, temperature and number of samples, in
turn in one process. `generate` is asked for the samples of a prompt together (num_return_sequences) in a third variant.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from qlora_dpo.cli.startup.quiet import quiet_libraries
from qlora_dpo.model import base, device, sources
from qlora_dpo.on_policy.prompts import collect_prompts
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.talk.generate import sample_completions, stop_token_ids, tokenize_prompt
from qlora_dpo.talk.sampling import SamplingParams

BATCH_TOKENS = 2**16


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("--count", type=int, default=16, help="prompts")
    parser.add_argument("--samples", type=int, default=4, help="answers to each")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    asked = parser.parse_args()
    quiet_libraries()
    table, here = ModelTable(name=asked.model, quantization="none"), device.select_device(asked.dtype)
    source = sources.fetch_model(table)
    tokenizer, model = base.load_tokenizer(source), base.load_base(source, table, here).to(here.torch_dtype).eval()
    prompts = collect_prompts(asked.prompts, "train", None, asked.count, 0)
    ids = [tokenize_prompt(tokenizer, prompt.messages) for prompt in prompts]
    settings = SamplingParams(temperature=0.9, top_p=1.0, max_new_tokens=asked.max_new_tokens, seed=0)
    variants: dict[str, Callable[[], int]] = {
        "ours": lambda: ours(model, tokenizer, ids, asked.samples, settings),
        "generate, one at a time": lambda: theirs(model, tokenizer, ids, asked.samples, settings, together=False),
        "generate, a prompt at a time": lambda: theirs(model, tokenizer, ids, asked.samples, settings, together=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in variants}
    tokens: dict[str, int] = {}
    with torch.inference_mode():
        for _ in range(asked.rounds + 1):
            for name, answer in variants.items():
                started = time.perf_counter()
                tokens[name] = answer()
                rates[name].append(len(ids) * asked.samples / (time.perf_counter() - started))
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}  # the first round warms up
    print(f"{asked.model}, {here.compute_dtype}, {here.name}, {len(ids)} prompts, {asked.samples} answers each,")
    print(
        f"at most {asked.max_new_tokens} tokens, medians of {asked.rounds} rounds; torch {torch.__version__}, ", end=""
    )
    print(f"transformers {transformers.__version__}")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} answers/s | {tokens[name]} tokens | {medians['ours'] / median:.1f} |")


def ours(model: Any, tokenizer: Any, ids: list[list[int]], samples: int, settings: SamplingParams) -> int:
    """The tokens of all answers."""
    seeds = [str(number) for number in range(len(ids))]
    batches = sample_completions(model, tokenizer, ids, samples, settings, seeds, BATCH_TOKENS)
    return sum(answer.tokens for _, of_batch in batches for of_prompt in of_batch for answer in of_prompt)


def theirs(
    model: Any, tokenizer: Any, ids: list[list[int]], samples: int, settings: SamplingParams, *, together: bool
) -> int:
    """The tokens of all answers by `generate`, the samples of a prompt together or each on its own."""
    torch.manual_seed(0)
    stop_ids, tokens = sorted(stop_token_ids(model, tokenizer)), 0
    for prompt in ids:
        for _ in range(1 if together else samples):
            found = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=True,
                temperature=settings.temperature,
                top_p=1.0,
                top_k=0,
                max_new_tokens=settings.max_new_tokens,
                num_return_sequences=samples if together else 1,
                eos_token_id=stop_ids,
                pad_token_id=tokenizer.pad_token_id,
            )
            tokens += int((found[:, len(prompt) :] != tokenizer.pad_token_id).sum())
    return tokens


if __name__ == "__main__":
    main()
