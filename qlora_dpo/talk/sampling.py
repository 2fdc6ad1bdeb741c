"""Sampling parameters of replies, with the defaults of chat and serve."""

import secrets
from dataclasses import dataclass, field, fields
from typing import Any

from qlora_dpo.errors import RecipeError


@dataclass(frozen=True)
class SamplingParams:
    """How replies are sampled. There is no top-k, no repetition penalty and no minimum length."""

    temperature: float = 0.7
    """0 takes the likeliest token every time; higher is more varied."""
    top_p: float = 0.9
    """Sample from the likeliest tokens that together hold this probability."""
    max_new_tokens: int = 512
    """Longest reply, in tokens."""
    seed: int = field(default_factory=lambda: secrets.randbelow(2**31))
    """Seed of the random draws; by default another one in every chat."""

    def __post_init__(self) -> None:
        """Raise RecipeError for a value out of range."""
        if self.temperature != 0 and not 0.01 <= self.temperature <= 100:
            raise RecipeError(f"temperature is {self.temperature}; it must be 0 (the likeliest token), or 0.01 to 100")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (all tokens)")
        if self.max_new_tokens < 1:
            raise RecipeError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise RecipeError(f"seed is {self.seed}; it must be 0 or more")


SAMPLING_PARAM_NAMES = tuple(field.name for field in fields(SamplingParams))


def resolve_sampling_params(generation_config: Any, context: int | None, given: dict[str, Any]) -> SamplingParams:
    """The parameters in `given`, else temperature and top_p of the model's generation config, else the defaults.

    `context` is the model's longest context in tokens; by default a reply takes at most half of it.
    """
    values: dict[str, Any] = {"max_new_tokens": min(SamplingParams.max_new_tokens, context // 2)} if context else {}
    for name in ("temperature", "top_p"):
        if (value := getattr(generation_config, name, None)) is not None:
            values[name] = value
    return SamplingParams(**values | {name: value for name, value in given.items() if value is not None})
