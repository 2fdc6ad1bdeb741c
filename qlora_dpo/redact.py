"""Removes secrets from texts that are written or printed: those of the environment and of the hub login, and tokens."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

REDACTED = "***"
_SECRET_NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_LIKELY_SECRET = re.compile(
    # hub, OpenAI, GitHub, GitLab, Slack, AWS, Google
    r"\b(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abp]-|AKIA|AIza)[A-Za-z0-9_-]{16,}"
    r"|(?<=://)[^/\s@]+(?=@)"  # user and password in a URL
    r"|(?<=[?&]token=)[^&\s]+|(?<=[?&]key=)[^&\s]+",
    re.IGNORECASE,
)
_CERTAIN_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bgh[opsu]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{40,}|\bglpat-[A-Za-z0-9_-]{20,}"
    r"|\bsk-[A-Za-z0-9_-]{40,}|\bAKIA[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{35}|://[^/\s:@]*:[^/\s@]+@"
)
MIN_SECRET_LENGTH = 8
"""Characters of the shortest value that counts as a secret: a shorter one would occur in ordinary words."""


def redact_secrets(text: str) -> str:
    """`text` with every secret replaced by ***."""
    for secret in sorted(_known_secrets(), key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    return _LIKELY_SECRET.sub(REDACTED, text)


def find_secret_line(text: str) -> int | None:
    """The first line, counted from 1, that certainly has a token or a URL with a password; None if no line has."""
    secret = _CERTAIN_SECRET.search(text)
    return text.count("\n", 0, secret.start()) + 1 if secret else None


def _known_secrets() -> Iterator[str]:
    """The token of the hub login, and values (not paths) of environment variables that are named like secrets."""
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name) and len(value) >= MIN_SECRET_LENGTH and not value.startswith(("/", "~")):
            yield value
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    try:
        token = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return
    if len(token) >= MIN_SECRET_LENGTH:
        yield token
