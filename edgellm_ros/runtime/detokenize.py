"""Which text may be shown after each token: never half a character, and in the end what decoding all ids gives."""

from __future__ import annotations

import codecs

from edgellm_ros.tokenizer import Tokenizer

_MAX_PENDING = 16  # tokens; a character is at most 4 bytes, so a longer wait for one is for nothing


class Detokenizer:
    """Turns ids into text one at a time, in constant time each. One object per answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.byte_level else None
        self._window: list[int] = []  # the ids last shown, for their neighbours' sake, then those not yet shown
        self._num_shown = 0  # of the window

    def push(self, token_id: int) -> str:
        """The text that `token_id` makes certain; empty while a character or a run of byte tokens is incomplete."""
        if self._tokenizer.is_skipped(token_id):
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._window.append(token_id)
        if self._tokenizer.byte_value(token_id) is not None:
            return ""  # one bad byte turns its whole run into U+FFFD, so a run is shown when it has ended
        return self._show(hold_broken=len(self._window) - self._num_shown < _MAX_PENDING)

    def finish(self) -> str:
        """The text still held back; a character that stayed incomplete is U+FFFD."""
        if self._utf8 is not None:
            return self._utf8.decode(b"", True)
        return self._show(hold_broken=False)

    def _show(self, hold_broken: bool) -> str:
        if self._num_shown == len(self._window):
            return ""
        text = self._tokenizer.decode(self._window)
        if hold_broken and text.endswith("\ufffd"):
            return ""
        # The ids shown before are decoded again because a decoder treats the first token of a text differently
        # (SentencePiece strips its leading space).
        before = self._tokenizer.decode(self._window[: self._num_shown])
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return text[len(before) :]
