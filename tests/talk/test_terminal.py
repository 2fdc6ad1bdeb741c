"""A terminal shows any output of a model, a file or a hub as text: tested on an emulator with random strings."""

import random

import pyte
import pytest

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.talk.terminal import EscapeFilter

# parts of escape sequences, words, and characters that reorder or hide text
PARTS = (
    *(
        "\x1b",
        "\x1b[",
        "\x1b]0;",
        "\x1b]52;c;",
        "\x1bP",
        "\x1b\\",
        "\x1b(0",
        "\x1b7",
        "\x1bc",
        "\x9b",
        "\x9d",
        "\x90",
        "\x9c",
    ),
    *(
        "\x07",
        "\x08",
        "\r",
        "\x00",
        "\x0e",
        "\x0f",
        "\x7f",
        "\x85",
        "\x8d",
        "\u202e",
        "\u2066",
        "\u200b",
        "\ufeff",
        "\u2028",
    ),
    *("31m", "2J", "1;1H", "?25l", "?1049h", "5n", "c", "K", "A", "3;7r", "!p", " q", "#8"),
    *("word", "a", "7", ";", " ", "\n", "\t", "[", "]", "(", "m"),
)
COLUMNS, LINES = 300, 40


def random_text(draw: random.Random) -> str:
    return "".join(draw.choice(PARTS) for _ in range(draw.randint(1, 24)))


def shown(text: str) -> tuple[list[str], dict[str, object]]:
    """The lines that a terminal shows after `text`, and the parts of its state that changed: none by plain text."""
    screen = pyte.Screen(COLUMNS, LINES)
    before = _state(screen)
    pyte.Stream(screen).feed(text.replace("\n", "\r\n"))
    return [line.rstrip() for line in screen.display], {
        name: value for name, value in _state(screen).items() if value != before[name]
    }


def _state(screen: pyte.Screen) -> dict[str, object]:
    return {
        "mode": set(screen.mode),
        "margins": screen.margins,
        "title": (screen.title, screen.icon_name),
        "attributes": screen.cursor.attrs,
        "hidden": screen.cursor.hidden,
        "charset": screen.charset,
        "saved": list(screen.savepoints),
        "tabs": set(screen.tabstops),
    }


def expected(text: str) -> list[str]:
    lines = [line.expandtabs(8).rstrip() for line in text.split("\n")]
    return lines + [""] * (LINES - len(lines))


@pytest.mark.parametrize("count", [250, pytest.param(100_000, marks=pytest.mark.slow)])
def test_sanitized_text_is_text_to_a_terminal(count: int) -> None:
    draw = random.Random(0)
    for _ in range(count):
        raw = random_text(draw)
        safe = sanitize_text(raw)
        lines, changed = shown(safe)
        assert (lines, changed) == (expected(safe), {}), ascii(raw)


@pytest.mark.parametrize("count", [250, pytest.param(100_000, marks=pytest.mark.slow)])
def test_text_that_is_streamed_is_as_safe(count: int) -> None:
    draw = random.Random(1)
    for _ in range(count):
        raw, stream, told = random_text(draw), EscapeFilter(), ""
        start = 0
        while start < len(raw):
            stop = start + draw.randint(1, 5)
            told += stream.feed(raw[start:stop])
            start = stop
        told += stream.flush()
        lines, changed = shown(told)
        assert (lines, changed) == (expected(told), {}), ascii(raw)


def test_the_emulator_notices_what_controls_a_terminal() -> None:
    assert shown("a\x1b[2Jb")[0] != expected("ab")
    assert "title" in shown("\x1b]0;title\x07")[1]
    assert "attributes" in shown("\x1b[31m")[1]
