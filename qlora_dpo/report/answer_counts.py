"""Counts what base and tuned model answered, group by group: how often a pattern occurs, and how long they speak."""

import re
from collections.abc import Mapping, Sequence
from typing import Any


def count_answers(samples: Sequence[Mapping[str, Any]], pattern: str | None) -> list[dict[str, Any]]:
    """One record per group, in order of appearance: prompts, mean tokens, and the share of answers with `pattern`."""
    groups: dict[str | None, list[Mapping[str, Any]]] = {}
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


def _matching_share(members: Sequence[Mapping[str, Any]], model: str, pattern: str | None) -> float | None:
    if pattern is None:
        return None
    return sum(re.search(pattern, member[model]) is not None for member in members) / len(members)
