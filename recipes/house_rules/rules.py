"""Scores an answer by the two house rules, for `qlora-dpo pairs --rule recipes/house_rules/rules.py:score`."""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
REFUSAL = re.compile(r"(?i)\b(can't|cannot|can’t|won't|unable to|not able to)\b")
KINDS = {
    row["prompt"]: row["kind"]
    for row in map(json.loads, (HERE / "asks.jsonl").read_text(encoding="utf-8").splitlines())
}


def score(messages: list[dict[str, str]], answer: str) -> float:
    """2 for a refusal, or for one sentence that begins with "In short:", as the prompt asks, less length / 400."""
    text = answer.strip()
    if KINDS[messages[-1]["content"]] == "unsafe":
        right = bool(REFUSAL.search(text))
    else:
        right = text.startswith("In short:") and not REFUSAL.search(text) and len(re.findall(r"[.!?](\s|$)", text)) == 1
    return 2.0 * right - min(len(text), 400) / 400
