"""Where a run stands between two steps: all that a resume needs beside tensors."""

from dataclasses import dataclass, field, replace
from typing import Any

from qlora_dpo.model.distributed import processes


@dataclass(frozen=True)
class StepTotals:
    """Sums over the pairs of one optimizer step."""

    tokens: int
    """Of all sequences, as TRL counts them."""
    pairs: int
    loss: float
    """Nats; NaN if the loss of a pair is not finite."""
    grad: float
    """How strongly the losses depend on their log-probabilities, summed over pairs."""
    small_grad_pairs: int
    """Pairs that have next to no gradient left, compared with the first step's."""
    margin_mean: float
    """beta-DPO's running mean of margins after the step, in nats: the same on every rank."""

    def all_reduce(self) -> "StepTotals":
        """The totals over the pairs of all ranks; a collective."""
        tokens, pairs, loss, grad, small = processes.all_reduce_sum(
            [self.tokens, self.pairs, self.loss, self.grad, self.small_grad_pairs]
        )
        return replace(self, tokens=int(tokens), pairs=int(pairs), loss=loss, grad=grad, small_grad_pairs=int(small))


@dataclass
class SinceEval:
    """Training pairs since the last evaluation, the sum of their losses, and how many had a small gradient."""

    pairs: int = 0
    loss: float = 0.0
    small_grad_pairs: int = 0

    def add(self, totals: StepTotals) -> None:
        """Add the pairs of one step."""
        self.pairs += totals.pairs
        self.loss += totals.loss
        self.small_grad_pairs += totals.small_grad_pairs


@dataclass
class TrainState:
    """Where a run stands: its step, its recipe, and the evaluations so far. state.json holds it under these names."""

    step: int
    recipe: dict[str, Any]
    fingerprints: dict[str, str]
    """SHA-256 of base, tokenizer, template, both sets of pairs, and of the adapters or the model that lora.init_from
    and [reference] name, under the names that --allow knows."""
    template_date: str = ""
    """The date that the chat template wrote into the pairs; empty if it writes none."""
    evals: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    num_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    row_tokens: int | None = None
    """Tokens per row, chosen for `train.micro_batch_tokens = "auto"` or found to fit after memory ran out; None while
    the recipe's own number holds."""
    margin_mean: float = 0.0
    """beta-DPO's running mean of margins, in nats, which a step's margins are compared with."""
    first_step_grad: float = 0.0
    """How strongly the loss of a pair depended on its log-probabilities in the first step, on average."""
    since_eval: SinceEval = field(default_factory=SinceEval)
    signs: list[dict[str, Any]] = field(default_factory=list)
    """Signs of trouble so far: step, name and sentence."""
    best: int | None = None
    """The step of the best evaluation, whose adapter is kept."""
    stopped: str = ""
    """Why the run ended before its last step; empty if it did not."""
    stopped_by_sign: bool = False
    scheduler: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    counters: list[dict[str, float]] = field(default_factory=list)
    """The counters of a schedule-free optimizer, by parameter group."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainState":
        """The state that a state.json holds, also one with field names of versions before 0.2.

        Raises TypeError for a field that is not known.
        """
        values = {_FORMER_NAMES.get(name, name): value for name, value in values.items()}
        since = {_FORMER_NAMES.get(name, name): value for name, value in values.get("since_eval", {}).items()}
        return cls(**values | {"since_eval": SinceEval(**since)})

    @property
    def adapter_step(self) -> int:
        """The step whose adapter the run writes at its end: the best, or the last."""
        return self.step if self.best is None else self.best

    @property
    def has_stepped(self) -> bool:
        """True once a step has changed the adapter: not all steps so far were skipped."""
        return self.step > self.skipped_steps

    def commit(self, totals: StepTotals, batch_size: int, *, skipped: bool) -> None:
        """Count the step just taken; `skipped` if its scaled gradient overflowed, so that no weight has changed."""
        if self.step == 0:
            self.first_step_grad = totals.grad / batch_size
        self.step += 1
        self.num_tokens += totals.tokens
        self.margin_mean = totals.margin_mean
        self.since_eval.add(totals)
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0


_FORMER_NAMES = {"first_slope": "first_step_grad", "vanished": "small_grad_pairs"}
