"""The table [objective]: each `loss_type` has its own set of keys; a key that the loss does not read is refused."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from qlora_dpo.recipe.tables import NonEmptyStr, NonNegativeFloat, PositiveFloat, RecipeTable

LabelSmoothing = Annotated[float, Field(ge=0, lt=0.5)]
PLAIN_LOSSES = ("hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sigmoid_norm", "cal_dpo")


class PairwiseLoss(RecipeTable):
    """The keys that every loss over pairs has."""

    sft_weight: NonNegativeFloat = 0.0
    """Weight of the negative log-likelihood per token of the chosen completion (RPO), which is added to the loss."""
    use_weighting: bool = False
    """Weight each pair by the probability of its completions under the policy (WPO)."""
    weight_column: NonEmptyStr | None = None
    """The column of numbers by which each pair's loss is multiplied; absent: 1 for all."""


class ReferenceLoss(PairwiseLoss):
    """The keys that every loss with a reference has."""

    beta: PositiveFloat = 0.1
    """How strongly the policy is kept close to the reference."""
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """Weight of the tokens beyond the length of the shorter completion (LD-DPO); absent: 1."""


class FDivergenceLoss(ReferenceLoss):
    """Losses that can use another divergence than the reverse KL."""

    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """The divergence that keeps the policy close to the reference (f-DPO)."""
    f_alpha_divergence_coef: PositiveFloat | None = None
    """The alpha of `alpha_divergence`, and read only with that; absent: 0.5. At 1 it is the reverse KL."""

    @model_validator(mode="after")
    def _check_coefficient(self) -> "FDivergenceLoss":
        if self.f_alpha_divergence_coef is not None and self.f_divergence_type != "alpha_divergence":
            raise ValueError('has f_alpha_divergence_coef, which only f_divergence_type = "alpha_divergence" reads')
        return self


class Sigmoid(FDivergenceLoss):
    """DPO (Rafailov et al. 2023); with smoothed labels, conservative DPO."""

    loss_type: Literal["sigmoid"] = "sigmoid"
    """The loss."""
    label_smoothing: LabelSmoothing = 0.0
    """The share of pairs that are assumed to have swapped labels."""
    margin_column: NonEmptyStr | None = None
    """The column of numbers, in nats, by which the chosen reward must exceed the rejected one; absent: 0."""


class Robust(FDivergenceLoss):
    """Provably robust DPO (Chowdhury et al. 2024)."""

    loss_type: Literal["robust"]
    """The loss."""
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)]
    """The share of pairs that have swapped labels."""


class ExoPair(FDivergenceLoss):
    """EXO for pairs (Ji et al. 2024)."""

    loss_type: Literal["exo_pair"]
    """The loss."""
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
    """The share of pairs that have swapped labels; it cannot be 0."""


class PlainLoss(FDivergenceLoss):
    """Losses that have no keys of their own: IPO, hinge (SLiC), NCA, BCO, SPPO, APO, length-normalized DPO, Cal-DPO."""

    loss_type: Literal[
        "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sigmoid_norm", "cal_dpo"
    ]
    """The loss."""

    @model_validator(mode="after")
    def _check_divergence(self) -> "PlainLoss":
        if self.f_divergence_type != "reverse_kl" and self.loss_type not in ("hinge", "ipo", "sigmoid_norm"):
            raise ValueError(f'has f_divergence_type, which loss_type = "{self.loss_type}" does not read')
        return self


class Aot(ReferenceLoss):
    """Alignment by optimal transport (Melnyk et al. 2024): sorted margins are compared, over the pairs of a step."""

    loss_type: Literal["aot", "aot_unpaired"]
    """The loss."""
    label_smoothing: LabelSmoothing = 0.0
    """The share of pairs that are assumed to have swapped labels."""


class Discopop(FDivergenceLoss):
    """DiscoPOP (Lu et al. 2024)."""

    loss_type: Literal["discopop"]
    """The loss."""
    discopop_tau: PositiveFloat = 0.05
    """The temperature at which its two parts are blended."""


class Dpop(ReferenceLoss):
    """DPO-Positive (Pal et al. 2024): a chosen completion that is less likely than under the reference is penalized."""

    loss_type: Literal["dpop"]
    """The loss."""
    dpop_lambda: NonNegativeFloat = 50.0
    """Weight of the penalty, in nats per nat; 0 is DPO."""


class Rdpo(ReferenceLoss):
    """R-DPO (Park et al. 2024): a preference that the greater length of a completion explains is not learned."""

    loss_type: Literal["rdpo"]
    """The loss."""
    length_alpha: NonNegativeFloat = 0.01
    """Nats per token by which the completions differ in length; 0 is DPO."""


class Odpo(ReferenceLoss):
    """DPO with an offset (Amini et al. 2024): the margin must exceed an offset that grows with the scores' gap."""

    loss_type: Literal["odpo"]
    """The loss."""
    score_columns: Annotated[list[NonEmptyStr], Field(min_length=2, max_length=2)] = Field(
        default=["score_chosen", "score_rejected"]
    )
    """The columns with the scores of the chosen and the rejected completion."""
    odpo_alpha: NonNegativeFloat = 1.0
    """Weight of the logarithm of the scores' difference; 0 is DPO."""


class BetaDpo(ReferenceLoss):
    """beta-DPO (Wu et al. 2024), without its data filter: beta is set from the margins of each step's pairs."""

    loss_type: Literal["beta_dpo"]
    """The loss."""
    beta_alpha: NonNegativeFloat = 0.6
    """How strongly beta depends on the margins; 0 is DPO."""
    beta_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of the running mean that the margins are compared with."""


class SamPo(PairwiseLoss):
    """SamPO (Lu et al. 2024): of the longer completion, only as many random tokens count as the shorter one has."""

    loss_type: Literal["sampo"]
    """The loss."""
    beta: PositiveFloat = 0.1
    """How strongly the policy is kept close to the reference."""


class WeightedSum(ReferenceLoss):
    """A weighted sum of losses (MPO)."""

    loss_type: Literal["sum"]
    """The loss."""
    loss_weights: Annotated[
        dict[
            Literal[
                "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sigmoid_norm"
            ],
            PositiveFloat,
        ],
        Field(min_length=1),
    ]
    """Weights by loss, as in `loss_weights = { sigmoid = 0.8, bco_pair = 0.2 }`; all use the same `beta`."""


class Simpo(PairwiseLoss):
    """SimPO (Meng et al. 2024): mean log-probabilities, a target margin and no reference."""

    loss_type: Literal["simpo"]
    """The loss."""
    beta: PositiveFloat = 2.0
    """The scale of the rewards."""
    simpo_gamma: NonNegativeFloat = 1.0
    """The target margin between the chosen and the rejected reward."""
    label_smoothing: LabelSmoothing = 0.0
    """The share of pairs that are assumed to have swapped labels."""


class AlphaPo(PairwiseLoss):
    """AlphaPO (Gupta et al. 2025): SimPO with a reward of another shape."""

    loss_type: Literal["alphapo"]
    """The loss."""
    beta: PositiveFloat = 2.0
    """The scale of the rewards."""
    simpo_gamma: NonNegativeFloat = 1.0
    """The target margin between the chosen and the rejected reward."""
    alphapo_alpha: float = 0.25
    """The alpha of the reward (1 - p^-alpha) / alpha; 0 is SimPO."""


class Cpo(PairwiseLoss):
    """CPO (Xu et al. 2024): DPO without a reference, plus the likelihood of the chosen completion."""

    loss_type: Literal["cpo"]
    """The loss."""
    beta: PositiveFloat = 0.1
    """The scale of the rewards."""
    sft_weight: NonNegativeFloat = 1.0
    """Weight of the negative log-likelihood per token of the chosen completion (`cpo_alpha`)."""
    label_smoothing: LabelSmoothing = 0.0
    """The share of pairs that are assumed to have swapped labels."""


class Orpo(PairwiseLoss):
    """ORPO (Hong et al. 2024): the likelihood of the chosen completion and its odds against the rejected one."""

    loss_type: Literal["orpo"]
    """The loss."""
    beta: PositiveFloat = 0.1
    """Weight of the odds ratio (the paper's lambda)."""
    sft_weight: NonNegativeFloat = 1.0
    """Weight of the negative log-likelihood per token of the chosen completion."""


class Kto(RecipeTable):
    """KTO (Ethayarajh et al. 2024): single completions that are labelled good or bad."""

    loss_type: Literal["kto"]
    """The loss."""
    beta: PositiveFloat = 0.1
    """How strongly the policy is kept close to the reference."""
    desirable_weight: NonNegativeFloat = 1.0
    """Weight of the completions whose label is true."""
    undesirable_weight: NonNegativeFloat = 1.0
    """Weight of the completions whose label is false."""
    weight_column: NonEmptyStr | None = None
    """The column of numbers by which each completion's loss is multiplied; absent: 1 for all."""


class Sft(RecipeTable):
    """The negative log-likelihood per token of the chosen completion; the supervised stage before DPO."""

    loss_type: Literal["sft"]
    """The loss."""
    weight_column: NonEmptyStr | None = None
    """The column of numbers by which each pair's loss is multiplied; absent: 1 for all."""


def _objective_tag(value: Any) -> str:
    is_table = isinstance(value, dict)
    loss = value.get("loss_type", "sigmoid") if is_table else getattr(value, "loss_type", "sigmoid")
    return str(next((group for losses, group in _LOSS_GROUPS.items() if loss in losses), loss))


_LOSS_GROUPS = {PLAIN_LOSSES: "plain", ("aot", "aot_unpaired"): "aot"}

Objective = Annotated[
    Annotated[Sigmoid, Tag("sigmoid")]
    | Annotated[Robust, Tag("robust")]
    | Annotated[ExoPair, Tag("exo_pair")]
    | Annotated[PlainLoss, Tag("plain")]
    | Annotated[Aot, Tag("aot")]
    | Annotated[Discopop, Tag("discopop")]
    | Annotated[Dpop, Tag("dpop")]
    | Annotated[Rdpo, Tag("rdpo")]
    | Annotated[Odpo, Tag("odpo")]
    | Annotated[BetaDpo, Tag("beta_dpo")]
    | Annotated[SamPo, Tag("sampo")]
    | Annotated[WeightedSum, Tag("sum")]
    | Annotated[Simpo, Tag("simpo")]
    | Annotated[AlphaPo, Tag("alphapo")]
    | Annotated[Cpo, Tag("cpo")]
    | Annotated[Orpo, Tag("orpo")]
    | Annotated[Kto, Tag("kto")]
    | Annotated[Sft, Tag("sft")],
    Discriminator(_objective_tag),
]
OBJECTIVE_TABLES: tuple[type[RecipeTable], ...] = (
    *(Sigmoid, Robust, ExoPair, PlainLoss, Aot, Discopop, Dpop, Rdpo, Odpo, BetaDpo, SamPo, WeightedSum),
    *(Simpo, AlphaPo, Cpo, Orpo, Kto, Sft),
)
ReferenceFree = Simpo | AlphaPo | Cpo | Orpo | Sft


def reward_beta(table: Objective) -> float:
    """The factor of the implicit rewards: the objective's beta, and 1 for SFT, which has none.

    `compare` and `merge` take DPO's default beta instead, since they may be given an adapter without a recipe.
    """
    return 1.0 if isinstance(table, Sft) else table.beta


def loss_types(table: type[RecipeTable]) -> tuple[str, ...]:
    """The values of `loss_type` that select `table`."""
    return tuple(table.model_fields["loss_type"].annotation.__args__)  # type: ignore[union-attr]
