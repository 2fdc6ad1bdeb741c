"""Suggests the commands to type after a run."""

import shlex
from pathlib import Path


def format_next_commands(run_dir: Path) -> str:
    """Two lines to paste: one to chat with the tuned model, one to merge it."""
    folder = run_dir.resolve()
    current = Path.cwd().resolve()
    name = shlex.quote(str(folder.relative_to(current) if folder.is_relative_to(current) else folder))
    chat, merge = f"qlora-dpo chat {name}", f"qlora-dpo merge {name}"
    width = max(len(chat), len(merge)) + 3
    return f"{chat:<{width}}# talk to it\n{merge:<{width}}# write the full model\n"
