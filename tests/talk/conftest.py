"""Fixtures of this folder."""

from chat_sessions import folders

__all__ = ["folders"]
