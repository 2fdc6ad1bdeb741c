"""The repository's root, and the code blocks of its documents."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def blocks(page: Path) -> list[str]:
    """The page's code blocks."""
    return re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
