"""Tokens become text as they come, up to a stop string."""

from collections.abc import Callable, Sequence

from graft.chat import Pieces


class Speech:
    """The text of one answer. No piece ends within a character of several tokens, or within what may become a stop
    string; of a stop string that was written nothing is given.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._pieces = Pieces(decode)
        self._stops = stops
        self._held = ""
        self.stopped = False
        """Whether a stop string was written."""

    def add(self, token: int) -> str:
        """The text that one more token completes."""
        return self._until_stop(self._pieces.add(token), whole=False)

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._until_stop(self._pieces.rest(), whole=True)

    def _until_stop(self, piece: str, whole: bool) -> str:
        if self.stopped:
            return ""
        self._held += piece
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        if found:
            given, self._held = self._held[: min(found)], ""
            return given
        keep = 0 if whole else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        given, self._held = self._held[:cut], self._held[cut:]
        return given


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
