"""Numbers per pair that an objective reads from columns of the data: weights, margins, scores."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.data.pairs import Pair
from qlora_dpo.errors import DataError, RecipeError
from qlora_dpo.preference.objective import LossColumns
from qlora_dpo.recipe.objective import Kto, Objective, Odpo, PairwiseLoss, Sft, Sigmoid


def column_keys(table: Objective) -> dict[str, str]:
    """The columns that the objective reads, each with the recipe key that names it."""
    keys: dict[str, str] = {}
    if isinstance(table, PairwiseLoss | Sft | Kto) and table.weight_column:
        keys[table.weight_column] = "objective.weight_column"
    if isinstance(table, Sigmoid) and table.margin_column:
        keys[table.margin_column] = "objective.margin_column"
    if isinstance(table, Odpo):
        keys |= dict.fromkeys(table.score_columns, "objective.score_columns")
    return keys


def read_loss_columns(pairs: Sequence[Pair], table: Objective) -> LossColumns:
    """The columns of `pairs` as tensors (P,); raises DataError, naming the row, for a value that is not a number."""
    weight = table.weight_column if isinstance(table, PairwiseLoss | Sft | Kto) else None
    if isinstance(table, Kto) != (pairs[0].label is not None):
        raise RecipeError(
            'the rows are answers with a label, which only loss_type = "kto" reads; set [objective], or give pairs'
            if pairs[0].label is not None
            else 'loss_type = "kto" reads answers with a label, and the rows are pairs; choose another loss'
        )
    margin = table.margin_column if isinstance(table, Sigmoid) else None
    scores = table.score_columns if isinstance(table, Odpo) else None
    return LossColumns(
        weight_P=_float_column(pairs, weight, minimum=0.0) if weight else None,
        margin_P=_float_column(pairs, margin) if margin else None,
        label_P=torch.tensor([bool(pair.label) for pair in pairs]) if isinstance(table, Kto) else None,
        scores_P2=torch.stack([_float_column(pairs, column) for column in scores], 1) if scores else None,
    )


def _float_column(pairs: Sequence[Pair], column: str, minimum: float = -math.inf) -> Tensor:
    return torch.tensor([_parse_float(pair, column, minimum) for pair in pairs])


def _parse_float(pair: Pair, column: str, minimum: float) -> float:
    text = pair.extra[column]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= minimum):
        wanted = "a number that is not negative" if minimum == 0 else "a number"
        raise DataError(f'row {pair.row}: its "{column}" is "{sanitize_text(text)[:40]}"; it must be {wanted}')
    return value
