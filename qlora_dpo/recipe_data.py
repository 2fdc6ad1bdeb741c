"""The recipe's table of the preference pairs."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora_dpo.recipe_tables import DATA_ENDINGS, Positive, Table, Text, is_local


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
