"""The most tokens of a run that go through the model at once."""

from dataclasses import dataclass

from qlora_dpo.data.encode import PairSet
from qlora_dpo.data.encoded import EncodedPair, pair_lengths, sequence_lengths
from qlora_dpo.recipe import Recipe


@dataclass(frozen=True)
class Workload:
    """The most tokens that go through the model at once."""

    max_sequence_tokens: int
    """The longest prompt with its longer completion."""
    step_tokens: int
    """All pairs of an optimizer step."""
    max_pair_tokens: int = 0
    """The longest pair in a packed row, its prompt counted once; 0: as long as the longest sequence."""
    reference_tokens: int = 0
    """All pairs of the larger of the two sets that the reference pass scores before the first step; 0: more than a row
    holds."""

    def longest_pair_tokens(self, *, padded: bool) -> int:
        """Tokens of a row that holds the longest pair alone; padded, both its sequences have the same length."""
        # and a column of padding (preference/pack.py)
        return 2 * (self.max_sequence_tokens + 1) if padded else max(self.max_sequence_tokens, self.max_pair_tokens)

    def longest_pair(self) -> EncodedPair:
        """A pair as long as the longest: a tile of attention saves all keys it sees, so long pairs keep more."""
        sequence = self.max_sequence_tokens
        completion = min(max(self.max_pair_tokens - sequence, sequence // 8, 1), sequence - 1)
        ids = range(2, 2 + sequence - completion), range(2, 2 + completion), range(2 + completion, 2, -1)
        prompt, chosen, rejected = map(tuple, ids)
        return EncodedPair(prompt, chosen, rejected, 1, b"")


def workload_of(train: PairSet, heldout: PairSet, recipe: Recipe) -> Workload:
    """The workload of these pairs."""
    lengths = [pair_lengths(pair_set.encoded).sum(axis=1) for pair_set in (train, heldout)]
    sequence = max(int(sequence_lengths(pair_set.encoded).max()) for pair_set in (train, heldout))
    pair, tokens = max(int(length_P.max()) for length_P in lengths), [int(length_P.sum()) for length_P in lengths]
    step = recipe.train.batch_size * pair
    # in a single epoch the other pairs are scored along with their step
    steps = 1 if recipe.train.num_train_epochs == 1 else recipe.train.max_steps
    tokens[0] = min(tokens[0], steps * step) if steps else tokens[0]
    return Workload(sequence, step, pair, max(tokens))
