"""The table [data]: the preference pairs and how they are tokenized."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora_dpo.recipe.tables import (
    NonEmptyStr,
    PositiveFloat,
    PositiveInt,
    RecipeTable,
    has_data_suffix,
    is_glob,
    is_local_path,
    is_saved_dataset,
)

FormatName = Literal[
    "auto",
    "hh",
    "hh_prompt",
    "strings",
    "messages",
    "chats",
    "sharegpt",
    "alpaca",
    "ranked",
    "unpaired",
    "compared",
    "supervised",
    "text",
]


class MixTable(RecipeTable):
    """One source of a mixture; a recipe has one such table per source."""

    source: NonEmptyStr
    """A hub data set, local file, pattern or folder, as in `data.train`."""
    split: NonEmptyStr = "train"
    """The split of a hub data set or folder."""
    revision: NonEmptyStr | None = None
    """A branch, tag or commit of a hub data set."""
    config: NonEmptyStr | None = None
    """The configuration of a hub data set that has several."""
    data_dir: NonEmptyStr | None = None
    """The folder of a hub data set whose files are read."""
    format: FormatName = "auto"
    """The preference format of this source's rows; `auto` detects it and reports it."""
    columns: dict[NonEmptyStr, NonEmptyStr] = Field(default={})
    """Our names of columns, and the names that this source has for them."""
    weight: PositiveFloat | None = None
    """How many pairs of this source are used for each pair of a source with weight 1. No pair is repeated: the source
    that runs out first decides how many there are. Absent, in all tables: every pair is used."""
    max_samples: PositiveInt | None = None
    """Use at most this many pairs of this source, including its held-out pairs; drawn with `train.seed`."""


class DataTable(RecipeTable):
    """The preference pairs, and how they are tokenized."""

    train: NonEmptyStr | None = None
    """A hub data set (`Dahoas/full-hh-rlhf`), a local file (.jsonl, .ndjson, .json, .csv, .tsv, also as .gz, .parquet,
    .arrow), a pattern (`./part-*.jsonl`) or a folder of files. Paths in a recipe are relative to the recipe's folder,
    paths given with `--set` to the current one. Required unless there are `[[data.mix]]` tables."""
    mix: list[MixTable] | None = None
    """Train on a mixture: one `[[data.mix]]` table per source, instead of `train`."""
    train_split: NonEmptyStr = "train"
    """The split of a hub data set or folder to train on."""
    eval: NonEmptyStr | None = None
    """The source of the held-out pairs; absent: the same as `train`."""
    eval_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold out the pairs of this share of the prompts of `train`, so that no prompt is both trained on and held out.
    Absent: 0.1 if `train` is a file, a pattern, a saved data set without splits or a mixture and there is no `eval`;
    otherwise the split `eval_split` is held out."""
    eval_split: NonEmptyStr = "test"
    """The split of a hub data set or folder that is held out."""
    revision: NonEmptyStr | None = None
    """A branch, tag or commit of a hub data set."""
    config: NonEmptyStr | None = None
    """The configuration of a hub data set that has several."""
    data_dir: NonEmptyStr | None = None
    """The folder of a hub data set whose files are read (`helpful-base` of `Anthropic/hh-rlhf`)."""
    format: FormatName = "auto"
    """The preference format of the rows; `auto` detects it and reports it. `compared` is two answers and a word on
    which is the better one, in columns that `auto` knows, or in `a`, `b` and `winner` by `columns`. `supervised` is
    questions and answers for `loss_type = "sft"`, and `text` a column of that name with chats in the marks of a known
    chat template."""
    columns: dict[NonEmptyStr, NonEmptyStr] = Field(default={})
    """Our names of columns, and the names that the data has for them: `{ prompt = "question", chosen = "good" }`."""
    ranked_pairs: Literal["all", "best_worst"] = "all"
    """Which ranked completions of a prompt become pairs: any two of different rank, or the best and the worst."""
    answer: Literal["last", "from_difference"] = "last"
    """Which answers of two whole chats are compared: the last ones, before which the chats must be equal, or the first
    ones in which they differ; what follows these is left out and counted."""
    train_on: Literal["all", "last"] = "all"
    """Which of the assistant's turns of a chat are trained on with `loss_type = "sft"`: all, each of which counts as a
    pair, or the last one."""
    max_length: PositiveInt = 512
    """Maximum length of prompt plus completion, in tokens."""
    overlong: Literal["drop", "cut_prompt", "error"] = "drop"
    """What happens to a pair longer than `max_length`: drop it, cut the front of its prompt, or refuse the run."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The run is refused if more than this share of the rows are not usable pairs (equal or empty completions, invalid
    roles, ...); pairs longer than `max_length` do not count as such."""
    max_train_samples: PositiveInt | None = None
    """Train on this many pairs, drawn with `train.seed`; absent: all."""
    max_eval_samples: PositiveInt | None = None
    """Evaluate on this many pairs, drawn with `train.seed`; absent: all."""

    @model_validator(mode="after")
    def _check_sources(self) -> "DataTable":
        if self.mix is None:
            if self.train is None:
                raise ValueError('needs the key "train"')
            return self
        if len(self.mix) < 2:
            raise ValueError("has fewer than two [[data.mix]] tables; name a single source in train")
        for_eval = ("eval_split", "revision", "config", "data_dir", "format", "columns")
        for key in ("train", "train_split", *(() if self.eval else for_eval)):
            if getattr(self, key) != DataTable.model_fields[key].default:
                raise ValueError(f"has both {key} and [[data.mix]] tables; each table of a mixture has its own keys")
        weighted = [table for table in self.mix if table.weight is not None]
        if weighted and len(weighted) < len(self.mix):
            raise ValueError("mixes tables with and without a weight; give each [[data.mix]] one, or none")
        for table in self.mix:
            for key in ("revision", "config", "data_dir"):
                if getattr(table, key) is not None and is_local_path(table.source):
                    raise ValueError(
                        f"mixes {table.source} with a {key}, which only a hub data set takes; leave it out"
                    )
        return self

    @model_validator(mode="after")
    def _check_eval_pairs(self) -> "DataTable":
        if self.eval is not None and self.eval_share is not None:
            raise ValueError("has both eval and eval_share; name the held-out pairs, or hold a share out, not both")
        if self.train is None:
            return self
        may_hold_splits = self.train.lower().endswith((".json", ".json.gz")) and self.train_split != self.eval_split
        if self.eval == self.train and has_data_suffix(self.train) and not may_hold_splits:
            raise ValueError("trains and evaluates on the same file; name another file of held-out pairs")
        if (
            self.effective_eval_share is None
            and self.eval in (None, self.train)
            and self.train_split == self.eval_split
        ):
            raise ValueError(f'trains and evaluates on the same split "{self.train_split}"; give another eval_split')
        for key in ("revision", "config", "data_dir"):
            if (
                getattr(self, key) is not None
                and is_local_path(self.train)
                and (self.eval is None or is_local_path(self.eval))
            ):
                raise ValueError(f"has a {key}, which only a hub data set takes; leave it out")
        return self

    @property
    def effective_eval_share(self) -> float | None:
        """The share of the training prompts that is held out; None if the held-out pairs have a source or split."""
        if self.eval_share is not None or self.eval is not None:
            return self.eval_share
        is_file = self.train is None or has_data_suffix(self.train) or is_glob(self.train)
        return 0.1 if is_file or is_saved_dataset(str(self.train)) else None

    @property
    def train_description(self) -> str:
        """The source of the training pairs, or all sources of a mixture, for a message."""
        return self.train or " + ".join(table.source for table in self.mix or ())
