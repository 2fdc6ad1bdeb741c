"""Sampling parameters of replies, with the defaults of chat and serve."""

import logging
import math
import secrets
from dataclasses import dataclass, field, fields
from typing import Any

from qlora_dpo.errors import RecipeError

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100

logger = logging.getLogger(__name__)


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
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            raise RecipeError(
                f"temperature is {self.temperature}; it must be 0 (the likeliest token), or {MIN_TEMPERATURE} to "
                f"{MAX_TEMPERATURE}"
            )
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
        if (value := getattr(generation_config, name, None)) is None or given.get(name) is not None:
            continue
        if (usable := _usable(name, value)) is not None:
            values[name] = usable
        if usable != value:
            instead = f"{getattr(SamplingParams, name)}, the default" if usable is None else f"{usable:g}"
            logger.info(f"the model's generation_config.json has {name} = {value!r}; used instead: {instead}")
    return SamplingParams(**values | {name: value for name, value in given.items() if value is not None})


def _usable(name: str, value: Any) -> float | None:
    """A value of a model's generation config as it can be used here; None if it cannot."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    if name == "temperature" and 0 <= value < MIN_TEMPERATURE:
        return 0  # files write a tiny temperature for the likeliest token, since transformers refuses 0
    return value if 0 < value <= (MAX_TEMPERATURE if name == "temperature" else 1) else None
