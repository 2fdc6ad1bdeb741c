"""What setup.cfg and pyproject.toml ask of the code: style, types and the direction of imports."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CHECKS = {
    "style": ["-m", "ruff", "check", "--no-cache", "."],
    "format": ["-m", "ruff", "format", "--no-cache", "--check", "."],
    "types": ["-m", "mypy", "--cache-dir={cache}"],
    "imports": ["-c", "from importlinter.cli import lint_imports_command as check; check()", "--cache-dir={cache}"],
}


@pytest.mark.parametrize("check", CHECKS)
def test_the_code_keeps_its_promises(check: str, tmp_path: Path) -> None:
    command = [part.format(cache=tmp_path) for part in CHECKS[check]]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
