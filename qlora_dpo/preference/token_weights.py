"""Weights of the tokens in a completion's log-probability: all 1, or those of LD-DPO and SamPO."""

import random
from dataclasses import dataclass

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.recipe.objective import Objective, ReferenceLoss, SamPo

TokenWeights = tuple[list[float], list[float]]
"""One weight per token of the chosen and of the rejected completion."""


@dataclass(frozen=True)
class TokenWeighting:
    """An objective's token weights, and the name that the reference cache knows them by."""

    name: str
    ld_alpha: float | None = None

    def weights(self, pair: EncodedPair) -> TokenWeights:
        """One weight per token, the same for reference and policy."""
        lengths = len(pair.chosen), len(pair.rejected)
        shorter = min(lengths)
        if self.ld_alpha is not None:
            # Liu et al. 2024, eq. 8: tokens up to the shorter length count 1, the rest ld_alpha
            alpha = self.ld_alpha
            chosen, rejected = ([1.0] * shorter + [alpha] * (length - shorter) for length in lengths)
            return chosen, rejected
        draw = random.Random(pair.digest)  # noqa: S311 - a sample of tokens, no secret
        chosen, rejected = (_random_mask(length, shorter, draw) for length in lengths)
        return chosen, rejected


def make_token_weighting(table: Objective) -> TokenWeighting | None:
    """The token weighting of an objective; None if all tokens count 1."""
    match table:
        case SamPo():
            return TokenWeighting("sampo")
        case ReferenceLoss() if table.ld_alpha is not None and table.ld_alpha != 1:
            return TokenWeighting(f"ld {table.ld_alpha!r}", table.ld_alpha)
        case _:
            return None


def _random_mask(length: int, count: int, draw: random.Random) -> list[float]:
    """1 for `count` tokens drawn at random, 0 for the others."""
    kept = set(draw.sample(range(length), count))
    return [float(position in kept) for position in range(length)]
