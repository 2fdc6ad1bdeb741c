"""The records of a finished run, as a report reads them."""

from typing import Any

HOSTILE = '</pre></td><script>alert(1)</script>\n\n# A heading\n```\n---\n| a | b |\n{{ x }} {% x %} & "quotes"'

EVALS = [
    {
        "step": step,
        "epoch": step / 24,
        "eval_loss": loss,
        "eval_rewards/accuracies": accuracy,
        "eval_pairs": 60,
        "eval_ties": 0,
    }
    for step, loss, accuracy in [(0, 0.693147, 0.5), (24, 0.25, 0.95), (48, 0.31234567, 0.9)]
]

RESULTS: dict[str, Any] = {
    "evals": EVALS,
    "first": 0,
    "best": 24,
    "last": 48,
    "baselines": {"longer": 0.4, "shorter": 0.6},
    "pairs": {"train": 192, "eval": 60},
    "answers": [
        {
            "group": "un|safe",
            "prompts": 30,
            "base_matching": 0.1,
            "tuned_matching": 0.9,
            "base_tokens": 50.1,
            "tuned_tokens": 17.2,
        }
    ],
}

SAMPLES = [
    {
        "row": 3,
        "group": "un|safe",
        "prompt": [{"role": "user", "content": f"Question?\n{HOSTILE}"}],
        "chosen": "No.",
        "base": HOSTILE,
        "tuned": "No, but\x1b[31m red",
        "base_tokens": 50,
        "tuned_tokens": 3,
        "base_ended": False,
        "tuned_ended": True,
    }
]


def run(**changes: dict[str, Any]) -> dict[str, Any]:
    """A run.json on hub names; `changes` go into its tables."""
    value: dict[str, Any] = {
        "name": "hh",
        "command": "qlora-dpo train recipes/hh.toml",
        "versions": {"qlora_dpo": "0.1.0", "torch": "2.13.0"},
        "seed": 42,
        "steps": 48,
        "device": {"type": "cuda", "name": "Tesla T4", "compute_dtype": "fp16"},
        "base": {
            "name": "Qwen/Qwen2-0.5B-Instruct",
            "hub_id": "Qwen/Qwen2-0.5B-Instruct",
            "revision": "c540970f9e29518b1d8f06ab8b24cba66ad77b6d",
            "note": "",
            "quantization": "nf4",
            "double_quant": True,
        },
        "data": {"train": "Dahoas/full-hh-rlhf", "eval": None, "train_pairs": 192, "eval_pairs": 60},
        "seconds": {"total": 372.0},
    }
    for table, keys in changes.items():
        value[table] = {**value[table], **keys} if isinstance(keys, dict) else keys
    return value
