"""Reads prompts from plain text, one a line."""

from pathlib import Path

from qlora_dpo.errors import RecipeError
from qlora_dpo.files import text_lines


def read_prompt_lines(file: Path) -> list[str]:
    """The lines of `file` that are not blank; raises RecipeError if it cannot be read, or holds none."""
    try:
        lines = text_lines(file.expanduser().read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}; name a file of prompts") from error
    if not any(line.strip() for line in lines):
        raise RecipeError(f"{file}: holds no prompts; write one a line")
    return [line for line in lines if line.strip()]
