"""What setup.cfg and pyproject.toml ask of the code: style, types and the direction of imports."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CHECKS = {
    "style": ["-m", "ruff", "check", "."],
    "format": ["-m", "ruff", "format", "--check", "."],
    "types": ["-m", "mypy"],  # 20 seconds, a minute without a cache; `.ci/run` runs it first
    "imports": ["-c", "from importlinter.cli import lint_imports_command as check; check()"],
}


@pytest.mark.parametrize(
    "check", [pytest.param(check, marks=pytest.mark.slow) if check == "types" else check for check in CHECKS]
)
def test_the_code_keeps_its_promises(check: str) -> None:
    done = subprocess.run([sys.executable, *CHECKS[check]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
