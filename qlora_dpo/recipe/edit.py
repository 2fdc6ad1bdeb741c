"""Edits keys in the text of a recipe, and leaves every other line and comment unchanged."""

from collections.abc import Collection, Mapping

import tomli_w

from qlora_dpo.files import text_lines
from qlora_dpo.recipe.errors import key_lines


def edit_table(text: str, table: str, values: Mapping[str, str], removed: Collection[str] = ()) -> str:
    """`text` with the keys `values` set in its table `[table]`, and the keys `removed` deleted from it.

    A comment on the line of an old value is about that value and goes too. Values of several lines are not supported.
    """
    lines, where = text_lines(text), key_lines(text)
    gone = [where[table, key] for key in removed if (table, key) in where and key not in values]
    new = []
    for key, value in values.items():
        line = tomli_w.dumps({key: value}).rstrip("\n")
        if (table, key) in where:
            lines[where[table, key] - 1] = line
        else:
            new.append(line)
    head = where[(table,)]
    kept = [line for number, line in enumerate(lines[head:], head + 1) if number not in gone]
    return "\n".join([*lines[:head], *new, *kept]) + "\n"
