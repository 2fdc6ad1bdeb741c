"""Counts the answers of base and tuned model by group: how often a pattern occurs, and how long they are."""

import re
from collections.abc import Sequence
from typing import Any

from qlora_dpo.run_folder import Record


def count_answers(samples: Sequence[Record], pattern: str | None) -> list[dict[str, Any]]:
    """One record per group, in order of appearance: prompts, mean tokens, and share of answers that match `pattern`."""
    groups: dict[str | None, list[Record]] = {}
    for sample in samples:
        groups.setdefault(sample["group"], []).append(sample)
    return [
        {
            "group": group,
            "prompts": len(members),
            "base_matching": _matching_share(members, "base", pattern),
            "tuned_matching": _matching_share(members, "tuned", pattern),
            "base_tokens": sum(member["base_tokens"] for member in members) / len(members),
            "tuned_tokens": sum(member["tuned_tokens"] for member in members) / len(members),
        }
        for group, members in groups.items()
    ]


def _matching_share(members: Sequence[Record], model: str, pattern: str | None) -> float | None:
    if pattern is None:
        return None
    return sum(re.search(pattern, member[model]) is not None for member in members) / len(members)
