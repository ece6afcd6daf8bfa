"""Tokens become text as they come, up to a stop string."""

from collections.abc import Callable, Sequence


class Speech:
    """The text of one answer. No piece ends within a character of several tokens, or within what may become a stop
    string; of a stop string that was written nothing is given.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._begin = 0  # some tokens before those not shown: a token's text depends on the one before it
        self._read = 0
        self._held = ""
        self.stopped = False
        """Whether a stop string was written."""
        self.text = ""
        """Everything that was given."""

    def add(self, token: int) -> str:
        """The text that one more token completes."""
        self._ids.append(token)
        return self._more(whole=False)

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._more(whole=True)

    def _more(self, whole: bool) -> str:
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._begin : self._read])
        now = self._decode(self._ids[self._begin :])
        if whole or (not now.endswith("\ufffd") and len(now) > len(before)):
            self._held += now[len(before) :]
            self._begin, self._read = self._read, len(self._ids)
        given = self._until_stop(whole)
        self.text += given
        return given

    def _until_stop(self, whole: bool) -> str:
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            given, self._held = self._held[: min(found)], ""
            return given
        keep = 0 if whole else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        given, self._held = self._held[:cut], self._held[cut:]
        return given


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
