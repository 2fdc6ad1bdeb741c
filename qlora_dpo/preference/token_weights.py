"""How much each token of an answer counts in its log-probability: all alike, or as LD-DPO and SamPO weigh them."""

import random
from dataclasses import dataclass

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.recipe.objective import Objective, ReferenceLoss, SamPo

TokenWeights = tuple[list[float], list[float]]
"""Of the chosen and of the rejected answer, one per token."""


@dataclass(frozen=True)
class TokenWeighting:
    """Which tokens count, and the name under which the reference's answers about them are kept."""

    name: str
    ld_alpha: float | None = None

    def weights(self, pair: EncodedPair) -> TokenWeights:
        """One weight per token. Reference and policy are asked about the same tokens."""
        lengths = len(pair.chosen), len(pair.rejected)
        shorter = min(lengths)
        if self.ld_alpha is not None:
            # Liu et al. 2024, eq. 8: what both answers have room for counts whole, the rest ld_alpha times
            alpha = self.ld_alpha
            chosen, rejected = ([1.0] * shorter + [alpha] * (length - shorter) for length in lengths)
            return chosen, rejected
        draw = random.Random(pair.digest)  # noqa: S311 - which tokens count, no secret
        chosen, rejected = (_random_mask(length, shorter, draw) for length in lengths)
        return chosen, rejected


def make_token_weighting(table: Objective) -> TokenWeighting | None:
    """How the objective weighs tokens; None if all count alike."""
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
