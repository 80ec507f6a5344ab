"""The text of a growing answer, up to the first stop string; what may be the beginning of one is held back."""

from __future__ import annotations

from .tokenizer import Detokenizer


class Writer:
    """Concatenated, the pieces that `take` gives are the text. A stop string is not part of it, and is found wherever it begins, in
    mid-token too; of several that a token completes, the one that begins first counts."""

    def __init__(self, detokenizer: Detokenizer, stops: tuple[str, ...]) -> None:
        self._detokenizer, self._stops = detokenizer, stops
        self._held = ""  # not given out yet
        self.matched: str | None = None

    def push(self, tokens: tuple[int, ...]) -> int | None:
        """These tokens follow. How many of them it takes until a stop string stands there; the others do not count."""
        if not self._stops:
            self._held += self._detokenizer.push(tokens)
            return None
        for i, token in enumerate(tokens, 1):
            self._held += self._detokenizer.push((token,))
            found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
            if found:
                at, self.matched = min(found)
                self._held = self._held[:at]
                return i
        return None

    def take(self, *, is_last: bool = False) -> str:
        """The text that is certain now; all of it when nothing follows."""
        if is_last and self.matched is None:
            self._held += self._detokenizer.push((), is_last=True)
        length = len(self._held) if is_last else len(self._held) - self._num_uncertain()
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _num_uncertain(self) -> int:
        longest = min(max((len(stop) - 1 for stop in self._stops), default=0), len(self._held))
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)
