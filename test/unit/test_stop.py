"""Stop texts: found however the text is cut, never shown, and what only looked like one is shown in the end."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_ros.runtime.stop import StopStrings

TEXTS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3)


def obvious(text: str, stops: list[str]) -> tuple[str, bool]:
    """The shortest start of `text` that ends with a stop text, without the longest such stop text."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def run(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    watch, shown = StopStrings(stops), []
    for piece in pieces:
        text, stopped = watch.push(piece)
        shown.append(text)
        if stopped:
            return shown, True
    shown.append(watch.finish())
    return shown, False


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXTS, max_size=12), STOPS)
def test_a_stop_text_is_found_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    shown, stopped = run(pieces, stops)
    assert ("".join(shown), stopped) == obvious("".join(pieces), stops)


@settings(max_examples=200, deadline=None)
@given(TEXTS, STOPS)
def test_no_more_is_held_back_than_the_start_of_a_stop_text(text: str, stops: list[str]) -> None:
    watch, shown = StopStrings(stops), ""
    for i, char in enumerate(text):
        out, stopped = watch.push(char)
        shown += out
        if stopped:
            return
        held = text[len(shown) : i + 1]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
        longest = max(len(s[:k]) for s in stops for k in range(len(s)) if text[: i + 1].endswith(s[:k]))
        assert len(held) == longest


def test_a_stop_text_split_over_tokens_is_never_streamed() -> None:
    assert run(["Hello <", "|e", "nd", "|", "> more"], ["<|end|>"]) == (["Hello ", "", "", "", ""], True)


def test_held_back_text_is_shown_when_it_turns_out_not_to_match() -> None:
    assert run(["a<|en", "x"], ["<|end|>"]) == (["a", "<|enx", ""], False)


def test_held_back_text_is_shown_at_the_end() -> None:
    assert run(["a<|en"], ["<|end|>"]) == (["a", "<|en"], False)


def test_without_stop_texts_everything_is_shown_at_once() -> None:
    assert run(["a", "b"], []) == (["a", "b", ""], False)
