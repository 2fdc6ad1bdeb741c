"""Ends a reply at the first of several stop strings, which may arrive split over two chunks."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class StopStringFilter:
    """Passes text through up to the first of `strings`; drops that string and everything after it."""

    strings: Sequence[str] = ()
    held: str = ""
    found: bool = False

    def feed(self, chunk: str) -> str:
        """The text that can be shown by now, without an end that may be the beginning of a stop string."""
        if self.found:
            return ""
        text = self.held + chunk
        positions = [position for string in self.strings if (position := text.find(string)) >= 0]
        if positions:
            self.found, self.held = True, ""
            return text[: min(positions)]
        cut = min((self._possible_start(text, string) for string in self.strings), default=len(text))
        self.held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text held back so far, at the end of the reply."""
        text, self.held = self.held, ""
        return text

    @staticmethod
    def _possible_start(text: str, stop: str) -> int:
        """The position at the end of `text` where `stop` may have begun; len(text) if it has not."""
        longest = next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
        return len(text) - longest
