"""Two hundred recipes spoilt at random: each is refused in sentences that name the file, with code 2, no traceback."""

import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_dpo.cli import main
from qlora_dpo.errors import RecipeError
from qlora_dpo.recipe import load_recipe

RECIPES = [path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))]
KEY = re.compile(r"^[a-z_]+ *=", re.MULTILINE)
COUNT = 200

Dice = random.Random
VALUES = [
    "",
    '""',
    "true",
    "-1",
    "1e999",
    "nan",
    "[]",
    "{}",
    "[[1]]",
    "2020-01-02",
    "0x10",
    "'''",
    '"a"',
    "1.5",
    "10_0",
]


def lines_with_keys(lines: list[str]) -> list[int]:
    return [number for number, line in enumerate(lines) if KEY.match(line)]


def delete(text: str, dice: Dice) -> str:
    """Without one of its tables' headings or a line that is needed."""
    lines = text.splitlines()
    del lines[dice.choice([at for at, line in enumerate(lines) if KEY.match(line) or line.startswith("[")])]
    return "\n".join(lines)


def duplicate(text: str, dice: Dice) -> str:
    lines = text.splitlines()
    at = dice.choice([at for at, line in enumerate(lines) if KEY.match(line) or line.startswith("[")])
    return "\n".join([*lines[: at + 1], lines[at], *lines[at + 1 :]])


def mistype(text: str, dice: Dice) -> str:
    """A letter of a key changed, left out or doubled."""
    lines = text.splitlines()
    at = dice.choice(lines_with_keys(lines))
    letter = dice.randrange(len(lines[at].partition("=")[0].rstrip()))
    old = lines[at][letter]
    lines[at] = lines[at][:letter] + dice.choice(["", old * 2, "x", "-", ".", '"']) + lines[at][letter + 1 :]
    return "\n".join(lines)


def other_value(text: str, dice: Dice) -> str:
    lines = text.splitlines()
    at = dice.choice(lines_with_keys(lines))
    lines[at] = f"{lines[at].partition('=')[0]}= {dice.choice(VALUES)}"
    return "\n".join(lines)


def misplace(text: str, dice: Dice) -> str:
    """A line moved to another place."""
    lines = text.splitlines()
    line = lines.pop(dice.choice(lines_with_keys(lines)))
    lines.insert(dice.randrange(len(lines)), line)
    return "\n".join(lines)


def huge(text: str, dice: Dice) -> str:
    lines = text.splitlines()
    at = dice.choice(lines_with_keys(lines))
    lines[at] = f"{lines[at].partition('=')[0]}= {dice.choice(['9' * 100_000, '[' + '1,' * 50_000 + ']'])}"
    return "\n".join(lines)


def deep(text: str, dice: Dice) -> str:
    depth = dice.choice([50, 900, 50_000])
    return text + dice.choice(["\na = " + "[" * depth + "]" * depth, "\n[" + ".".join("a" * depth) + "]\n"])


def zero_byte(text: str, dice: Dice) -> str:
    at = dice.randrange(len(text))
    return text[:at] + "\0" + text[at:]


def byte_order_mark(text: str, dice: Dice) -> str:
    """One in the middle; one at the front is allowed."""
    at = dice.randrange(1, len(text))
    return text[:at] + "\ufeff" + text[at:]


def cut(text: str, dice: Dice) -> str:
    return text[: dice.randrange(len(text))]


def swap(text: str, dice: Dice) -> str:
    """Two characters exchanged."""
    at = dice.randrange(len(text) - 1)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def escapes(text: str, dice: Dice) -> str:
    """A key that would steer the terminal."""
    return text + f'\n"\\u001b[2J\\u202e{dice.random()}" = 1\n'


SPOIL: list[Callable[[str, Dice], str]] = [
    *(delete, duplicate, mistype, other_value, misplace, huge, deep, zero_byte, byte_order_mark, cut, swap, escapes)
]


def test_mutated_recipes_are_refused_in_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    dice, kinds, refused, harmless, slowest = Dice(5), dict.fromkeys(SPOIL, 0), 0, 0, 0.0
    while refused < COUNT:
        spoil = SPOIL[(refused + harmless) % len(SPOIL)]
        Path("bad.toml").write_text(spoil(dice.choice(RECIPES), dice), encoding="utf-8")
        try:
            load_recipe("bad.toml")
        except RecipeError:
            refused, kinds[spoil] = refused + 1, kinds[spoil] + 1
        else:
            harmless += 1  # a comment, a key with a default, a path
            continue
        started = time.monotonic()
        assert main(["train", "bad.toml"]) == 2
        slowest = max(slowest, time.monotonic() - started)
        told = capsys.readouterr()
        assert told.out == ""
        lines = told.err.splitlines()
        assert lines and len(lines) <= 40
        for line in lines:
            assert re.match(r"qlora-dpo: bad\.toml(:\d+)?: \S", line), line
            assert len(line) < 600 and line.isprintable(), line
        assert [path.name for path in tmp_path.iterdir()] == ["bad.toml"]
    print(f"{refused} spoilt recipes refused, {harmless} others were harmless; the slowest took {slowest:.2f} s")
    assert min(kinds.values()) > 0, kinds
