"""Whether a text that must end the answer has come, and how much of the newest text must wait until that is known."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches for stop texts (Knuth-Morris-Pratt, one state for each), whatever tokens they are split over.

    The stop text that ends first ends the answer; of several that end together the longest counts. So the result does
    not depend on how the text was cut into tokens.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are non-empty."""
        self._stops = tuple(stops)
        self._failures = [_failure_links(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each stop text that the end of the text matches
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take new text; returns what may be shown now, and whether a stop text has ended the answer.

        After True the stop text and all behind it are dropped.
        """
        if not self._stops:
            return text, False
        start = len(self._held)
        pending = self._held + text
        for end, char in enumerate(text, start + 1):
            longest = 0
            for i, stop in enumerate(self._stops):
                state, failure = self._matched[i], self._failures[i]
                while state and stop[state] != char:
                    state = failure[state - 1]
                if stop[state] == char:
                    state += 1
                if state == len(stop):
                    longest = max(longest, state)
                    state = failure[state - 1]
                self._matched[i] = state
            if longest:
                self._held = ""
                return pending[: end - longest], True
        keep = max(self._matched)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep], False

    def finish(self) -> str:
        """The text held back, once no more will come."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held


def _failure_links(pattern: str) -> list[int]:
    links = [0] * len(pattern)
    state = 0
    for i in range(1, len(pattern)):
        while state and pattern[state] != pattern[i]:
            state = links[state - 1]
        if pattern[state] == pattern[i]:
            state += 1
        links[i] = state
    return links
