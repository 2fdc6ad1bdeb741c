"""Ends a reply at the first of some strings, which may arrive split between two pieces."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class StopStringFilter:
    """Text that passes through until one of `strings` is in it; that string and all after it are left out."""

    strings: Sequence[str] = ()
    held: str = ""
    found: bool = False

    def feed(self, piece: str) -> str:
        """What can be shown: not what may turn out to be the beginning of a stop string."""
        if self.found:
            return ""
        text = self.held + piece
        places = [place for each in self.strings if (place := text.find(each)) >= 0]
        if places:
            self.found, self.held = True, ""
            return text[: min(places)]
        cut = min((self._begun(text, each) for each in self.strings), default=len(text))
        self.held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, for there will be no more."""
        text, self.held = self.held, ""
        return text

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """Where `stop` may have begun at the end of `text`."""
        longest = next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
        return len(text) - longest
