"""What the reference said of many pairs, found by their digests in 40 bytes a pair.

P pairs, Q pairs that are asked for. Log-probabilities are float32 sums over an answer, in nats, chosen and rejected.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DigestArray = NDArray[np.bytes_]
"""Of 32 bytes each; numpy compares all 32 and orders them as bytes."""
LogpArray = NDArray[np.float32]


@dataclass(frozen=True)
class LogpTable:
    """Each pair once, in the order of the digests. As Python objects they would take 300 bytes a pair."""

    digest_P: DigestArray
    logp_P2: LogpArray

    def __len__(self) -> int:
        return len(self.digest_P)

    def lookup(self, digest_Q: DigestArray) -> LogpArray:
        """Log-probabilities (Q, 2), NaN where they are not known."""
        found_Q2 = np.full((len(digest_Q), 2), math.nan, dtype=np.float32)
        if len(self):
            place_Q = np.minimum(np.searchsorted(self.digest_P, digest_Q), len(self) - 1)
            known_Q = self.digest_P[place_Q] == digest_Q
            found_Q2[known_Q] = self.logp_P2[place_Q[known_Q]]
        return found_Q2

    def merged_with(self, newer: "LogpTable") -> "LogpTable":
        """Both together; of pairs that both know, what `newer` says."""
        kept = np.isnan(newer.lookup(self.digest_P)[:, 0])
        own = self if kept.all() else LogpTable(self.digest_P[kept], self.logp_P2[kept])
        place_Q = np.searchsorted(own.digest_P, newer.digest_P)
        return LogpTable(
            np.insert(own.digest_P, place_Q, newer.digest_P), np.insert(own.logp_P2, place_Q, newer.logp_P2, axis=0)
        )


def make_logp_table(digests: Any, logps: Any) -> LogpTable:
    """Answers in any order; of a pair that is there several times, the last."""
    digest_P = np.asarray(digests, dtype="S32")
    logp_P2 = np.asarray(logps, dtype=np.float32).reshape(-1, 2)
    # np.unique keeps the first of each
    ordered, first = np.unique(digest_P[::-1], return_index=True)
    return LogpTable(ordered, logp_P2[::-1][first])


EMPTY_LOGP_TABLE = make_logp_table([], [])
