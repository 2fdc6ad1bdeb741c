"""The implicit reward of a completion: how much likelier training has made it, beta * log(pi / pi_ref).

In names: A tokens of a completion, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from qlora_dpo.data.dialogue import Message
from qlora_dpo.data.templates.chat_template import tokenize_chats
from qlora_dpo.errors import RecipeError
from qlora_dpo.model.device import Device
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.objective import Sigmoid
from qlora_dpo.talk.generate import stop_token_ids, tokenize_prompt


@dataclass(frozen=True)
class ImplicitReward:
    """Log-probabilities of a completion's tokens under the tuned model and its base, in nats."""

    tuned_logps: tuple[float, ...]
    base_logps: tuple[float, ...]

    @property
    def tuned(self) -> float:
        """Log-probability of the completion under the tuned model, in nats."""
        return sum(self.tuned_logps)

    @property
    def base(self) -> float:
        """Log-probability of the completion under the base, in nats."""
        return sum(self.base_logps)

    @property
    def tokens(self) -> int:
        """Number of tokens that are scored."""
        return len(self.tuned_logps)

    def per_token(self, beta: float) -> tuple[float, ...]:
        """The reward of each token, beta * log(pi / pi_ref), in nats."""
        return tuple(beta * (tuned - base) for tuned, base in zip(self.tuned_logps, self.base_logps, strict=True))

    def at_beta(self, beta: float) -> float:
        """Rafailov et al. 2023, eq. 5, without the partition function, which all answers to a prompt share."""
        return sum(self.per_token(beta))


def adapter_beta(recipe: Recipe | None) -> float:
    """The beta of an adapter's run; DPO's default if there is no recipe, or if its objective has no beta."""
    default = Sigmoid().beta
    return float(getattr(recipe.objective, "beta", default)) if recipe is not None else default


def implicit_reward(
    model: PeftModel, tokenizer: Any, device: Device, prompt: Sequence[Message], answer: str, ended: bool = True
) -> ImplicitReward:
    """Score `answer` as the trainer would: the tokens that the chat template gives it, including its end token.

    The end token of an answer that was cut off (`ended` is False) is not scored. Raises RecipeError if there is
    nothing to score.
    """
    prompt_ids = tokenize_prompt(tokenizer, prompt)
    ids = list(tokenize_chats(tokenizer, (), [[*prompt, {"role": "assistant", "content": answer}]])[0])
    if ids[: len(prompt_ids)] != prompt_ids or len(ids) == len(prompt_ids):
        raise RecipeError("the model's chat template writes this answer in a way that cannot be scored")
    completion_ids, stop_ids = ids[len(prompt_ids) :], stop_token_ids(model, tokenizer)
    end = next((index for index, token in enumerate(completion_ids) if token in stop_ids), len(completion_ids))
    scored_ids = completion_ids[: end + 1] if ended else completion_ids[:end]
    if not scored_ids:
        raise RecipeError("the answer has no tokens to score")
    with device.autocast():
        return rewards_per_adapter(model, model.active_adapters[:1], prompt_ids, scored_ids)[0]


def rewards_per_adapter(
    model: PeftModel, adapter_names: Sequence[str], prompt_ids: Sequence[int], completion_ids: Sequence[int]
) -> list[ImplicitReward]:
    """The implicit reward of a completion under each of the model's adapters; the base is run once for all of them.

    Call it inside the device's autocast.
    """
    if not completion_ids:
        return [ImplicitReward((), ()) for _ in adapter_names]
    with use_adapter(model, None):
        base_logps = _completion_logps(model, prompt_ids, completion_ids)
    rewards = []
    for name in adapter_names:
        with use_adapter(model, name):
            rewards.append(ImplicitReward(_completion_logps(model, prompt_ids, completion_ids), base_logps))
    return rewards


@contextmanager
def use_adapter(model: PeftModel, adapter_name: str | None) -> Iterator[None]:
    """Activate one adapter of the model or, with None, disable all of them while this is open.

    An adapter stays active afterwards; disabled ones are enabled again.
    """
    if adapter_name is None:
        with adapter_disabled(model):
            yield
        return
    model.set_adapter(adapter_name)
    model.requires_grad_(False)
    yield


@torch.no_grad()
def _completion_logps(model: Any, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> tuple[float, ...]:
    """Log-probability of each token of the completion (A,), in nats."""
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[*prompt_ids, *completion_ids]], device=device)
    # The last token predicts nothing that is scored
    logits_AV = model(input_ids=ids, use_cache=False, logits_to_keep=len(completion_ids) + 1).logits[0, :-1].float()
    target_A = torch.tensor(completion_ids, device=device)[:, None]
    return tuple(logits_AV.log_softmax(-1).gather(-1, target_A)[:, 0].tolist())
