"""The text of an answer as its bytes come, and where a stop text ends it."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class AnswerText:
    """The text of an answer, of which only what no stop text can take back is shown."""

    def __init__(self, stop: Sequence[str], strip: bool) -> None:
        self.text = ""
        self.stopped = False
        self._stop, self._strip, self._shown = stop, strip, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece: bytes) -> str:
        """What may be shown once `piece` has come."""
        self.text += self._decoder.decode(piece)
        if self._strip and not self._shown:
            self.text = self.text.lstrip()
        ends = [at for at in (self.text.find(stop, self._shown) for stop in self._stop) if at >= 0]
        if ends:
            self.text, self.stopped = self.text[: min(ends)], True
        held = 0 if self.stopped else max((_begun(self.text, stop) for stop in self._stop), default=0)
        return self._show(len(self.text) - held)

    def end(self) -> str:
        """What is left to show when no more comes."""
        if not self.stopped:
            self.text += self._decoder.decode(b"", final=True)
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        begin, self._shown = self._shown, max(end, self._shown)
        return self.text[begin : self._shown]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
