"""The table [objective]: a set of keys for each `loss_type`, so that a key which that loss does not read is refused."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from qlora_dpo.recipe.tables import NonEmptyStr, NonNegativeFloat, PositiveFloat, RecipeTable

LabelSmoothing = Annotated[float, Field(ge=0, lt=0.5)]
PLAIN_LOSSES = ("hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sigmoid_norm", "cal_dpo")


class PairwiseLoss(RecipeTable):
    """What every loss over pairs can have beside it."""

    sft_weight: NonNegativeFloat = 0.0
    """Weight of the negative log-likelihood per token of the chosen answer (RPO), added to the loss."""
    use_weighting: bool = False
    """Weigh each pair by how likely the model is to write its answers itself (WPO)."""
    weight_column: NonEmptyStr | None = None
    """A column of numbers by which each pair's loss is multiplied; absent: 1 for all."""


class ReferenceLoss(PairwiseLoss):
    """What every loss that compares with the reference can have."""

    beta: PositiveFloat = 0.1
    """How strongly the policy is held to the reference."""
    beta_end: PositiveFloat | None = None
    """beta moves from `beta` to this value in a straight line over the run; absent: it stays."""
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """Weight of the tokens beyond the length of the shorter answer (LD-DPO); absent: 1."""


class FDivergenceLoss(ReferenceLoss):
    """Losses that take another divergence than the reverse KL."""

    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """The divergence that holds the policy to the reference (f-DPO)."""
    f_alpha_divergence_coef: PositiveFloat | None = None
    """The alpha of `alpha_divergence`, 0.5 if absent; 1 is the reverse KL. Read only with that."""

    @model_validator(mode="after")
    def _check_coefficient(self) -> "FDivergenceLoss":
        if self.f_alpha_divergence_coef is not None and self.f_divergence_type != "alpha_divergence":
            raise ValueError('has f_alpha_divergence_coef, which only f_divergence_type = "alpha_divergence" reads')
        return self


class Sigmoid(FDivergenceLoss):
    """DPO (Rafailov et al. 2023), with smoothed labels conservative DPO."""

    loss_type: Literal["sigmoid"] = "sigmoid"
    """The loss."""
    label_smoothing: LabelSmoothing = 0.0
    """The share of pairs assumed to be labelled the wrong way round."""
    margin_column: NonEmptyStr | None = None
    """A column of numbers, in nats, by which the chosen reward must be ahead; absent: 0."""


class Robust(FDivergenceLoss):
    """Provably robust DPO (Chowdhury et al. 2024)."""

    loss_type: Literal["robust"]
    """The loss."""
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)]
    """The share of pairs labelled the wrong way round."""


class ExoPair(FDivergenceLoss):
    """EXO for pairs (Ji et al. 2024)."""

    loss_type: Literal["exo_pair"]
    """The loss."""
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
    """The share of pairs labelled the wrong way round; it cannot be 0."""


class PlainLoss(FDivergenceLoss):
    """Losses without keys of their own: IPO, hinge (SLiC), NCA, BCO, SPPO, APO, length-normalized DPO, Cal-DPO."""

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
    """Alignment by optimal transport (Melnyk et al. 2024): margins are compared in order, over the pairs of a step."""

    loss_type: Literal["aot", "aot_unpaired"]
    """The loss."""
    label_smoothing: LabelSmoothing = 0.0
    """The share of pairs assumed to be labelled the wrong way round."""


class Discopop(FDivergenceLoss):
    """DiscoPOP (Lu et al. 2024)."""

    loss_type: Literal["discopop"]
    """The loss."""
    discopop_tau: PositiveFloat = 0.05
    """Temperature of the blend of its two parts."""


class Dpop(ReferenceLoss):
    """DPO-Positive (Pal et al. 2024): the chosen answer may not become less likely than under the reference."""

    loss_type: Literal["dpop"]
    """The loss."""
    dpop_lambda: NonNegativeFloat = 50.0
    """Weight of the penalty, in nats per nat; 0 is DPO."""


class Rdpo(ReferenceLoss):
    """R-DPO (Park et al. 2024): what a chosen answer's greater length explains is not learned as a preference."""

    loss_type: Literal["rdpo"]
    """The loss."""
    length_alpha: NonNegativeFloat = 0.01
    """Nats per token of difference in length; 0 is DPO."""


class Odpo(ReferenceLoss):
    """DPO with an offset (Amini et al. 2024): the margin must exceed what the scores differ by."""

    loss_type: Literal["odpo"]
    """The loss."""
    score_columns: Annotated[list[NonEmptyStr], Field(min_length=2, max_length=2)] = Field(
        default=["score_chosen", "score_rejected"]
    )
    """The columns with the scores of the chosen and the rejected answer."""
    odpo_alpha: NonNegativeFloat = 1.0
    """Weight of the logarithm of the difference; 0 is DPO."""


class BetaDpo(ReferenceLoss):
    """beta-DPO (Wu et al. 2024): beta follows the margins of each step's pairs. Without the paper's data filter."""

    loss_type: Literal["beta_dpo"]
    """The loss."""
    beta_alpha: NonNegativeFloat = 0.6
    """How strongly beta follows; 0 is DPO."""
    beta_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """How slowly the running mean follows that margins are compared with."""


class SamPo(PairwiseLoss):
    """SamPO (Lu et al. 2024): as many tokens of the longer answer count as the shorter one has, drawn at random."""

    loss_type: Literal["sampo"]
    """The loss."""
    beta: PositiveFloat = 0.1
    """How strongly the policy is held to the reference."""
    beta_end: PositiveFloat | None = None
    """beta moves from `beta` to this value in a straight line over the run; absent: it stays."""


class WeightedSum(ReferenceLoss):
    """A weighted sum of losses (MPO)."""

    loss_type: Literal["sum"]
    """The loss."""
    losses: Annotated[
        dict[
            Literal[
                "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sigmoid_norm"
            ],
            PositiveFloat,
        ],
        Field(min_length=1),
    ]
    """Weights by loss, as in `losses = { sigmoid = 0.8, bco_pair = 0.2 }`; they share `beta`."""


class Simpo(PairwiseLoss):
    """SimPO (Meng et al. 2024): mean log-probabilities, a target margin and no reference."""

    loss_type: Literal["simpo"]
    """The loss."""
    beta: PositiveFloat = 2.0
    """Scale of the rewards."""
    simpo_gamma: NonNegativeFloat = 1.0
    """The margin by which the chosen reward must be ahead."""
    label_smoothing: LabelSmoothing = 0.0
    """The share of pairs assumed to be labelled the wrong way round."""


class AlphaPo(PairwiseLoss):
    """AlphaPO (Gupta et al. 2025): SimPO with another shape of reward."""

    loss_type: Literal["alphapo"]
    """The loss."""
    beta: PositiveFloat = 2.0
    """Scale of the rewards."""
    simpo_gamma: NonNegativeFloat = 1.0
    """The margin by which the chosen reward must be ahead."""
    alpha: float = 0.25
    """Shape of the reward (1 - p^-alpha) / alpha; 0 is SimPO."""


class Cpo(PairwiseLoss):
    """CPO (Xu et al. 2024): log-probabilities without a reference, beside the likelihood of the chosen answer."""

    loss_type: Literal["cpo"]
    """The loss."""
    beta: PositiveFloat = 0.1
    """Scale of the rewards."""
    sft_weight: NonNegativeFloat = 1.0
    """Weight of the negative log-likelihood per token of the chosen answer (`cpo_alpha`)."""
    label_smoothing: LabelSmoothing = 0.0
    """The share of pairs assumed to be labelled the wrong way round."""


class Orpo(PairwiseLoss):
    """ORPO (Hong et al. 2024): the likelihood of the chosen answer and the odds against the rejected one."""

    loss_type: Literal["orpo"]
    """The loss."""
    beta: PositiveFloat = 0.1
    """Weight of the odds ratio (the paper's lambda)."""
    sft_weight: NonNegativeFloat = 1.0
    """Weight of the negative log-likelihood per token of the chosen answer."""


class Kto(RecipeTable):
    """KTO (Ethayarajh et al. 2024): answers that are labelled good or bad by themselves."""

    loss_type: Literal["kto"]
    """The loss."""
    beta: PositiveFloat = 0.1
    """How strongly the policy is held to the reference."""
    desirable_weight: NonNegativeFloat = 1.0
    """Weight of the answers whose label is true."""
    undesirable_weight: NonNegativeFloat = 1.0
    """Weight of the answers whose label is false."""
    weight_column: NonEmptyStr | None = None
    """A column of numbers by which each answer's loss is multiplied; absent: 1 for all."""


class Sft(RecipeTable):
    """The negative log-likelihood per token of the chosen answer alone; what comes before DPO."""

    loss_type: Literal["sft"]
    """The loss."""
    weight_column: NonEmptyStr | None = None
    """A column of numbers by which each pair's loss is multiplied; absent: 1 for all."""


def _objective_tag(value: Any) -> str:
    found = value.get("loss_type", "sigmoid") if isinstance(value, dict) else getattr(value, "loss_type", "sigmoid")
    return str(next((group for types, group in _LOSS_GROUPS.items() if found in types), found))


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


def loss_types(table: type[RecipeTable]) -> tuple[str, ...]:
    """The values of `loss_type` that choose `table`."""
    return tuple(table.model_fields["loss_type"].annotation.__args__)  # type: ignore[union-attr]


def objective_table(loss_type: object) -> type[RecipeTable] | None:
    """The table that `loss_type` chooses; None if it is none."""
    return next((table for table in OBJECTIVE_TABLES if loss_type in loss_types(table)), None)


def reward_beta(table: Objective) -> float:
    """The beta that scales rewards; 0.1, DPO's own default, for an objective that has none."""
    beta: float = getattr(table, "beta", 0.1)
    return beta
