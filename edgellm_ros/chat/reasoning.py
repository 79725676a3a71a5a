"""Decides which part of an answer is the model's reasoning and which is content, while the text is still arriving."""

from __future__ import annotations

__all__ = ["ReasoningSplitter", "starts_inside"]


def starts_inside(prompt: str, start: str, end: str) -> bool:
    """Whether the rendered `prompt` already ends in the start tag, so that the answer begins as reasoning."""
    return bool(start and end) and prompt.rstrip().endswith(start)


class ReasoningSplitter:
    """Splits streamed text at the tags around reasoning; no tag, whole or in part, comes out on either side.

    Newlines after a tag and before the end tag are dropped, and so are those before a start tag that opens the
    answer: the chat templates strip them too when they write an earlier answer into the next prompt. Without tags
    everything is content, unchanged.
    """

    def __init__(self, start: str, end: str, starts_inside: bool) -> None:
        """`start` and `end` are the model's tags, empty when it has none; see the function `starts_inside`."""
        self._start = start
        self._end = end
        self._enabled = bool(start and end)
        self._inside = starts_inside and self._enabled
        self._at_tag = self._inside  # nothing but newlines came since the last tag
        self._fresh = True  # nothing but newlines came at all
        self._held = ""  # may still turn out to be a tag, or newlines before one

    def push(self, text: str) -> tuple[str, str]:
        """Take more text; returns what is certain by now as (content, reasoning)."""
        if not self._enabled:
            return text, ""
        content: list[str] = []
        reasoning: list[str] = []
        text = self._held + text
        while True:
            tag, out = (self._end, reasoning) if self._inside else (self._start, content)
            before, found, after = text.partition(tag)
            if not found:
                keep = self._undecided(text, tag)
                self._held = text[len(text) - keep :]
                self._emit(text[: len(text) - keep], out)
                return "".join(content), "".join(reasoning)
            vanishes = self._inside or (self._fresh and not before.strip("\n"))
            self._emit(before.rstrip("\n") if vanishes else before, out)
            self._inside = not self._inside
            self._at_tag = True
            self._fresh = False
            text = after

    def finish(self) -> tuple[str, str]:
        """The text ended; returns what was still held back as (content, reasoning)."""
        rest, self._held = self._held, ""
        out: list[str] = []
        self._emit(rest.rstrip("\n") if self._inside else rest, out)
        return ("", "".join(out)) if self._inside else ("".join(out), "")

    def _emit(self, text: str, out: list[str]) -> None:
        if self._at_tag:
            text = text.lstrip("\n")
        if text:
            self._at_tag = self._fresh = False
            out.append(text)

    def _undecided(self, text: str, tag: str) -> int:
        """How many characters at the end may belong to `tag`, or are newlines that vanish if it follows."""
        longest = min(len(text), len(tag) - 1)
        partial = next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)
        rest = text[: len(text) - partial]
        if self._inside:
            return partial + len(rest) - len(rest.rstrip("\n"))
        if self._fresh and not rest.strip("\n"):
            return len(text)
        return partial
