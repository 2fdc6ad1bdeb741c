"""Reference log-probabilities of many pairs, sorted by the pairs' digests: 40 bytes a pair.

P pairs in the table, Q pairs that are looked up. Log-probabilities are float32 sums over a completion, in nats, in the
columns chosen and rejected.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DigestArray = NDArray[np.bytes_]
"""32 bytes each; numpy compares all 32 and orders them as bytes."""
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
        logp_Q2 = np.full((len(digest_Q), 2), math.nan, dtype=np.float32)
        if len(self):
            place_Q = np.minimum(np.searchsorted(self.digest_P, digest_Q), len(self) - 1)
            known_Q = self.digest_P[place_Q] == digest_Q
            logp_Q2[known_Q] = self.logp_P2[place_Q[known_Q]]
        return logp_Q2

    def merged_with(self, newer: "LogpTable") -> "LogpTable":
        """The entries of both tables; where both have a pair, that of `newer`."""
        kept = np.isnan(newer.lookup(self.digest_P)[:, 0])
        older = self if kept.all() else LogpTable(self.digest_P[kept], self.logp_P2[kept])
        place_Q = np.searchsorted(older.digest_P, newer.digest_P)
        return LogpTable(
            np.insert(older.digest_P, place_Q, newer.digest_P), np.insert(older.logp_P2, place_Q, newer.logp_P2, axis=0)
        )


def make_logp_table(digests: Any, logps: Any) -> LogpTable:
    """A table of entries in any order; where a pair occurs several times, the last entry counts."""
    digest_P = np.asarray(digests, dtype="S32")
    logp_P2 = np.asarray(logps, dtype=np.float32).reshape(-1, 2)
    # np.unique keeps the first of each
    ordered, first = np.unique(digest_P[::-1], return_index=True)
    return LogpTable(ordered, logp_P2[::-1][first])


EMPTY_LOGP_TABLE = make_logp_table([], [])
