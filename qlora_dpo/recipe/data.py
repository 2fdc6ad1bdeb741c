"""The recipe's table of the preference pairs."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora_dpo.recipe.tables import (
    DATA_SUFFIXES,
    NonEmptyStr,
    PositiveFloat,
    PositiveInt,
    RecipeTable,
    is_glob,
    is_local_path,
)

FormatName = Literal[
    "auto", "hh", "hh_prompt", "strings", "messages", "chats", "sharegpt", "alpaca", "ranked", "unpaired"
]


class MixTable(RecipeTable):
    """One source of a mixture; the recipe has a table of this name for each."""

    source: NonEmptyStr
    """A hub data set, local file, pattern or folder, as `data.train`."""
    split: NonEmptyStr = "train"
    """Split of a hub data set or folder."""
    revision: NonEmptyStr | None = None
    """A branch, tag or commit of a hub data set."""
    config: NonEmptyStr | None = None
    """Configuration of a hub data set that has several."""
    data_dir: NonEmptyStr | None = None
    """Folder of a hub data set whose files are read."""
    format: FormatName = "auto"
    """The shape of this source's rows; `auto` recognises it and says so."""
    columns: dict[NonEmptyStr, NonEmptyStr] = Field(default={})
    """Names of columns here, and what this source calls them."""
    weight: PositiveFloat | None = None
    """Pairs of this source for each pair that another source with weight 1 gives. No pair is repeated: the source that
    runs out first decides how many there are. Absent, in all tables: every pair is used."""
    max_samples: PositiveInt | None = None
    """Use at most this many pairs of this source, those that are held out from it included; drawn with `train.seed`."""


class DataTable(RecipeTable):
    """The preference pairs, and how they become tokens."""

    train: NonEmptyStr | None = None
    """A hub data set (`Dahoas/full-hh-rlhf`), a local file (.jsonl, .json, each also .gz, .csv, .parquet), a pattern
    that files match (`./part-*.jsonl`) or a folder of them. Paths in a recipe start at the recipe's own folder, paths
    given with `--set` at the current one. Needed, unless there are `[[data.mix]]` tables."""
    mix: list[MixTable] | None = None
    """Train on a mixture: a `[[data.mix]]` table for each source, instead of `train`."""
    train_split: NonEmptyStr = "train"
    """Split of a hub data set or folder to train on."""
    eval: NonEmptyStr | None = None
    """Where the held-out pairs are; absent: the same source as `train`."""
    eval_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold out the pairs of this share of the prompts of `train`, so that no prompt stands on both sides. Absent: 0.1
    where `train` is a file, a pattern or a mixture and there is no `eval`, else the split `eval_split` is held out."""
    eval_split: NonEmptyStr = "test"
    """Split of a hub data set or folder that is held out."""
    revision: NonEmptyStr | None = None
    """A branch, tag or commit of a hub data set."""
    config: NonEmptyStr | None = None
    """Configuration of a hub data set that has several."""
    data_dir: NonEmptyStr | None = None
    """Folder of a hub data set whose files are read (`helpful-base` of `Anthropic/hh-rlhf`)."""
    format: FormatName = "auto"
    """The shape of the rows; `auto` recognises it and says so."""
    columns: dict[NonEmptyStr, NonEmptyStr] = Field(default={})
    """Names of columns here, and what the data calls them: `{ prompt = "question", chosen = "good" }`."""
    ranked_pairs: Literal["all", "best_worst"] = "all"
    """Which ranked answers to one prompt make pairs: each two of different rank, or the best and the worst."""
    max_length: PositiveInt = 512
    """Longest prompt plus answer, in tokens."""
    overlong: Literal["drop", "cut_prompt", "error"] = "drop"
    """What happens to a pair longer than `max_length`: left out, its prompt cut at the front, or the run refused."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The run is refused if more than this share of the rows are no usable pairs (equal or empty answers, broken roles,
    ...); pairs longer than `max_length` do not count."""
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
        weighted = [each for each in self.mix if each.weight is not None]
        if weighted and len(weighted) < len(self.mix):
            raise ValueError("mixes tables with and without a weight; give each [[data.mix]] one, or none")
        for each in self.mix:
            for key in ("revision", "config", "data_dir"):
                if getattr(each, key) is not None and is_local_path(each.source):
                    raise ValueError(f"mixes {each.source} with a {key}, which only a hub data set takes; leave it out")
        return self

    @model_validator(mode="after")
    def _check_eval_pairs(self) -> "DataTable":
        if self.eval is not None and self.eval_share is not None:
            raise ValueError("has both eval and eval_share; name the held-out pairs, or hold a share out, not both")
        if self.train is None:
            return self
        if self.eval == self.train and self.train.endswith(DATA_SUFFIXES):
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
        """The share of the training prompts that is held out; None if the held-out pairs have a place."""
        if self.eval_share is not None or self.eval is not None:
            return self.eval_share
        whole = self.train is None or self.train.endswith(DATA_SUFFIXES) or is_glob(self.train)
        return 0.1 if whole else None

    @property
    def train_description(self) -> str:
        """What is trained on, in words: the source, or all sources of a mixture."""
        return self.train or " + ".join(each.source for each in self.mix or ())
