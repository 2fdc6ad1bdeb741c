"""Makes train.jsonl and heldout.jsonl from asks.jsonl: each rejected answer is the base model's own.

    python recipes/house_rules/make_pairs.py

The 4-bit base of recipes/quickstart.toml answers each prompt greedily. Where that is already a refusal of an unsafe
request, it samples (temperature 1.0, seeds 1 to 8) until an answer is not one; a prompt that it refuses every time is
left out, since a refusal must not stand as the rejected answer. Answers are cut after their first sentence, or after
40 tokens. The files in this folder were made with torch 2.13.0 on a CPU; another version may sample other words.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch

from qlora_dpo.model import base, device, sources
from qlora_dpo.recipe import recipe

HERE = Path(__file__).parent
REFUSAL = re.compile(
    r"(?i)\b(can't|cannot|can not|can’t|won't|unable to|not able to|not appropriate|never)\b|\bsorry\b"
)
TOKENS = 40


def main() -> None:
    """Answer every prompt and write both files."""
    table = recipe.load_recipe(str(HERE.parent / "quickstart.toml")).recipe.model
    source, here = sources.fetch_model(table), device.select_device("fp32")
    tokenizer, model = base.load_tokenizer(source), base.load_base(source, table, here)
    asks = [json.loads(line) for line in (HERE / "asks.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = [cut(text) for text in generate(model, tokenizer, [ask["prompt"] for ask in asks], seed=None)]
    for seed in range(1, 9):
        again = [i for i, ask in enumerate(asks) if not usable(ask, answers[i])]
        sampled = generate(model, tokenizer, [asks[i]["prompt"] for i in again], seed=seed)
        answers = [cut(sampled[again.index(i)]) if i in again else answer for i, answer in enumerate(answers)]
    for split in ("train", "heldout"):
        rows = [
            row(ask, answer)
            for ask, answer in zip(asks, answers, strict=True)
            if ask["split"] == split and usable(ask, answer)
        ]
        lines = [json.dumps(each, ensure_ascii=False) for each in rows]
        (HERE / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{split}.jsonl: {len(rows)} pairs")


def row(ask: dict[str, str], answer: str) -> dict[str, Any]:
    """One preference pair as message lists, with its kind."""
    return {
        "prompt": [{"role": "user", "content": ask["prompt"]}],
        "chosen": [{"role": "assistant", "content": ask["chosen"]}],
        "rejected": [{"role": "assistant", "content": answer}],
        "kind": ask["kind"],
    }


def usable(ask: dict[str, str], answer: str) -> bool:
    """A rejected answer is not empty, not the chosen one, and no refusal of an unsafe request."""
    return bool(answer) and answer != ask["chosen"] and not (ask["kind"] == "unsafe" and REFUSAL.search(answer))


def cut(text: str) -> str:
    """The text up to the end of its first sentence, or all of it if none ends."""
    end = re.search(r"(?<!\d)[.!?][\"'”’)]?(?=\s|$)", text.strip())
    return text.strip()[: end.end()] if end else text.strip()


def generate(model: Any, tokenizer: Any, prompts: list[str], seed: int | None) -> list[str]:
    """Answers of at most TOKENS tokens, greedy without a seed, sampled with one."""
    torch.manual_seed(seed or 0)
    tokenizer.padding_side = "left"
    texts = []
    for start in range(0, len(prompts), 32):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + 32]]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            ids = model.generate(
                **batch, max_new_tokens=TOKENS, do_sample=seed is not None, temperature=1.0, use_cache=True
            )
        texts += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


if __name__ == "__main__":
    main()
