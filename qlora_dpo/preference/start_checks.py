"""Checks before the first step: adapter-off is the base bit for bit, and the reference's log-probabilities are right.

P pairs, L tokens, V vocabulary. Log-probabilities are sums over a completion, in nats; 2 columns: chosen, rejected.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.errors import ModelError
from qlora_dpo.files import cache_home
from qlora_dpo.model.device import Device
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.preference.objective import dpo
from qlora_dpo.preference.pack import Packing
from qlora_dpo.preference.reference import model_logps


def probe_logits(model: nn.Module, pair: EncodedPair, device: Device) -> Tensor:
    """Logits (L, V) of one pair's prompt and chosen completion, from the model's own forward pass."""
    ids = torch.tensor([pair.prompt + pair.chosen], device=device.torch_device)
    with torch.no_grad(), device.autocast():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


def check_adapter_off_is_base(
    model: nn.Module, base_logits_LV: Tensor, pair: EncodedPair, packing: Packing, device: Device, *, fresh: bool = True
) -> None:
    """Check that adapter-off equals the base as loaded, bit for bit, and that our log-probabilities are the model's.

    `base_logits_LV` is the `probe_logits` of the base before the adapter was attached. With a `fresh` adapter,
    adapter-on must equal the base too, but for the order in which a matrix product sums. Raises ModelError.
    """
    with adapter_disabled(model):
        if not torch.equal(probe_logits(model, pair, device), base_logits_LV):
            raise ModelError(
                "with its adapter off the model differs from the base as loaded, so it cannot be the DPO reference; "
                "use an adapter that leaves the base as it is"
            )
    if fresh and not _equal_by_rounding(probe_logits(model, pair, device), base_logits_LV, device):
        raise ModelError("the untrained adapter changes the model, so the first loss would not be ln 2")
    logp_LV = base_logits_LV.float().log_softmax(-1)[len(pair.prompt) - 1 : -1]
    expected = logp_LV.gather(-1, torch.tensor(pair.chosen, device=logp_LV.device)[:, None]).sum().item()
    with adapter_disabled(model):  # every token counts once here, whatever the objective's weights are
        computed = model_logps(model, [pair], replace(packing, token_weighting=None), device)[0, 0].item()
    # a single completion, which in 16 bits moves by more than many together
    if not math.isclose(computed, expected, rel_tol=3 * device.tolerance, abs_tol=10 * device.tolerance):
        raise ModelError(
            f"the log-probability of a probe answer is {expected:.4f} by the model and {computed:.4f} by this program, "
            "which would train on wrong numbers; name a model of another family in model.name"
        )


def _equal_by_rounding(logits_LV: Tensor, base_logits_LV: Tensor, device: Device) -> bool:
    """True for logits that differ from the base's by no more than rounding can, or not at all."""
    distance = (logits_LV.float() - base_logits_LV.float()).norm()
    return torch.equal(logits_LV, base_logits_LV) or bool(distance <= device.tolerance * base_logits_LV.float().norm())


def check_training_mode(model: nn.Module, base_logits_LV: Tensor, pair: EncodedPair, device: Device) -> None:
    """Check that an untrained policy in training mode, as it is trained, is the base in evaluation mode.

    Raises ModelError for noise that `disable_dropout` does not know.
    """
    training = model.training
    model.train()
    try:
        logits_LV = probe_logits(model, pair, device)
    finally:
        model.train(training)
    if not _equal_by_rounding(logits_LV, base_logits_LV, device):
        raise ModelError(
            "in training mode this model computes other logits than in evaluation mode, by dropout or noise of its own "
            "that is not switched off, so the first loss would not be ln 2; name a model of another family"
        )


def check_first_loss(policy_P2: Tensor, reference_P2: Tensor, beta: float, device: Device) -> None:
    """Check that an untrained policy has the reference's log-probabilities, so that the first loss is ln 2.

    In float32 the loss must be ln 2 to 1e-4; in 16 bits another row may round differently, so the log-probabilities
    may differ by 2 % of their L2 norm. Raises ModelError.
    """
    drift_P2 = policy_P2 - reference_P2
    loss = dpo(drift_P2[:, 0] - drift_P2[:, 1], beta).mean().item()
    exact = abs(loss - math.log(2)) <= 1e-4
    close = bool(drift_P2.norm() <= device.tolerance * reference_P2.norm())
    if not (exact or (close and device.compute_dtype != "fp32")):
        raise ModelError(
            f"the first DPO loss would be {loss:.6f} instead of ln 2 = 0.693147: the cached reference does not belong "
            f"to this model; delete {cache_home() / 'reference'} and start again"
        )


def check_matches_peft(
    model: nn.Module, peft_logits_LV: Tensor, pair: EncodedPair, device: Device, folder: Path
) -> None:
    """Check that the adapter loaded into `model` is the one in `folder`, bit for bit, before `fuse_lora` runs.

    `peft_logits_LV` is the `probe_logits` of the base with that adapter as PEFT itself opens it. Raises ModelError.
    """
    if not torch.equal(probe_logits(model, pair, device), peft_logits_LV):
        raise ModelError(
            f"{folder}: the model with this adapter differs from the one that PEFT opens, so training would not go on "
            "from it; merge it, and name the merged model as model.name"
        )


def check_cached_logps(fresh_P2: Tensor, cached_P2: Tensor, device: Device) -> None:
    """Check cached log-probabilities of a few pairs against fresh ones, for references whose first loss is not ln 2.

    They may differ by what rounding explains: 1e-4 of their L2 norm in float32, 2 % in 16 bits. Raises ModelError.
    """
    if not bool((fresh_P2 - cached_P2).norm() <= device.tolerance * cached_P2.norm()):
        raise ModelError(
            f"the reference gives log-probabilities of {fresh_P2.sum():.4f} nats to a few pairs, and the cache has "
            f"{cached_P2.sum():.4f}: it does not belong to this reference; delete {cache_home() / 'reference'} and "
            "start again"
        )
