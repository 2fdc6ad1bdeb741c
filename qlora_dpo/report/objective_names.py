"""Names objectives, for people and as tags of the model hub."""

from qlora_dpo.run_folder import Record

OBJECTIVE_NAMES = {
    "sigmoid": "DPO",
    "robust": "robust DPO",
    "hinge": "SLiC's hinge loss",
    "ipo": "IPO",
    "exo_pair": "EXO",
    "nca_pair": "NCA",
    "bco_pair": "BCO",
    "sppo_hard": "SPPO",
    "apo_zero": "APO-zero",
    "apo_down": "APO-down",
    "sigmoid_norm": "length-normalized DPO",
    "cal_dpo": "Cal-DPO",
    "aot": "AOT",
    "aot_unpaired": "unpaired AOT",
    "discopop": "DiscoPOP",
    "dpop": "DPO-Positive",
    "rdpo": "R-DPO",
    "odpo": "ODPO",
    "beta_dpo": "beta-DPO",
    "sampo": "SamPO",
    "simpo": "SimPO",
    "alphapo": "AlphaPO",
    "cpo": "CPO",
    "orpo": "ORPO",
    "kto": "KTO",
    "sft": "SFT",
}
DPO = "DPO"


def describe_objective(objective: Record) -> str:
    """The loss by its usual name, with beta and a weighted SFT term if it has them: `DPO (beta 0.1) plus 1 * SFT`."""
    loss_weights = objective.get("loss_weights")
    if loss_weights:
        name = "a sum of " + ", ".join(
            f"{weight:g} * {OBJECTIVE_NAMES.get(loss, loss)}" for loss, weight in loss_weights.items()
        )
    else:
        name = OBJECTIVE_NAMES.get(objective["loss_type"], f"the loss {objective['loss_type']}")
    beta, sft = objective.get("beta"), objective.get("sft_weight")
    return name + (f" (beta {beta:g})" if beta is not None else "") + (f" plus {sft:g} * SFT" if sft else "")


def objective_tags(objective: Record) -> list[str]:
    """Tags for the model hub: the loss, and `dpo` for DPO and its variants."""
    loss = objective["loss_type"]
    is_dpo = loss == "sigmoid" or DPO in OBJECTIVE_NAMES.get(loss, "")
    return [*(["dpo"] if is_dpo else []), *([loss.replace("_", "-")] if loss not in ("sigmoid", "sum") else [])]
