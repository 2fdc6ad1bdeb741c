"""The implicit reward of an answer: how much likelier training has made it, beta * log(pi / pi_ref)."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from qlora_dpo.data.chat_template import chat_ids
from qlora_dpo.data.dialogue import Message
from qlora_dpo.errors import RecipeError
from qlora_dpo.model.device import Device
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.talk.generate import stop_token_ids, tokenize_prompt


@dataclass(frozen=True)
class ImplicitReward:
    """Log-probabilities of an answer's tokens under the tuned model and its base, summed, in nats."""

    tuned: float
    base: float
    tokens: int

    def at_beta(self, beta: float) -> float:
        """Rafailov et al. 2023, eq. 5, without the partition function, which all answers to a prompt share."""
        return beta * (self.tuned - self.base)


def implicit_reward(
    model: PeftModel, tokenizer: Any, device: Device, prompt: Sequence[Message], answer: str, ended: bool = True
) -> ImplicitReward:
    """Score `answer` as the trainer would: the tokens that the chat template gives it, its end token included.

    The end token of an answer that was cut off (`ended` is False) is not scored. Raises RecipeError if there is
    nothing to score.
    """
    before = tokenize_prompt(tokenizer, prompt)
    whole = list(chat_ids(tokenizer, [[*prompt, {"role": "assistant", "content": answer}]], answered=True)[0])
    if whole[: len(before)] != before or len(whole) == len(before):
        raise RecipeError("the model's chat template writes this answer in a way that cannot be scored")
    tokens, ends = whole[len(before) :], stop_token_ids(model, tokenizer)
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    scored = tokens[: end + 1] if ended else tokens[:end]
    if not scored:
        raise RecipeError("the answer has no tokens to score")
    tuned, base = (_logp(model, device, before, scored, off) for off in (False, True))
    return ImplicitReward(tuned, base, len(scored))


@torch.no_grad()
def _logp(model: PeftModel, device: Device, before: list[int], scored: list[int], off: bool) -> float:
    ids_RT = torch.tensor([before + scored], device=model.get_input_embeddings().weight.device)
    with ExitStack() as around:
        around.enter_context(device.autocast())
        if off:
            around.enter_context(adapter_disabled(model))
        # the last token predicts nothing that is scored
        logits_TV = model(input_ids=ids_RT, logits_to_keep=len(scored) + 1).logits[0, :-1].float()
    wanted_T = torch.tensor(scored, device=logits_TV.device)
    return float(logits_TV.log_softmax(-1).gather(-1, wanted_T[:, None]).sum())
