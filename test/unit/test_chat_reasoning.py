"""Reasoning apart from content, however the text is cut into pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_ros.chat import ReasoningSplitter, starts_inside

START, END = "<think>", "</think>"


def split(pieces: list[str], inside: bool = False, start: str = START, end: str = END) -> tuple[str, str]:
    splitter = ReasoningSplitter(start, end, inside)
    content = reasoning = ""
    for piece in pieces:
        more_content, more_reasoning = splitter.push(piece)
        content += more_content
        reasoning += more_reasoning
    more_content, more_reasoning = splitter.finish()
    return content + more_content, reasoning + more_reasoning


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>\nLet me see.\n</think>\n\nHello", False, ("Hello", "Let me see.")),
        ("Let me see.\n\n</think>\n\nHello", True, ("Hello", "Let me see.")),
        ("<think>\n\n</think>\n\nHello", False, ("Hello", "")),
        ("\n\n<think>a</think>b", False, ("b", "a")),
        ("Hello <b>you</b>", False, ("Hello <b>you</b>", "")),
        ("\nplain\n\ntext\n", False, ("\nplain\n\ntext\n", "")),
        ("<think>\ncut off\n", False, ("", "cut off")),
        ("<think>a\n\nb</thin", False, ("", "a\n\nb</thin")),
        ("1 < 2 <", False, ("1 < 2 <", "")),
        ("<think>a</think>b<think>c</think>\nd", False, ("bd", "ac")),
        ("a</think>b", False, ("a</think>b", "")),
        ("<<think>x</think>", False, ("<", "x")),
        ("", False, ("", "")),
    ],
)
def test_any_cut_gives_the_same_split(text: str, inside: bool, expected: tuple[str, str]) -> None:
    assert split([text], inside) == expected
    assert split(list(text), inside) == expected
    for cut in range(len(text)):
        assert split([text[:cut], text[cut:]], inside) == expected


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", "\n", "a", "é "]), max_size=12),
    st.lists(st.integers(0, 60), max_size=6),
    st.booleans(),
)
def test_cuts_never_change_the_split_of_random_texts(parts: list[str], cuts: list[int], inside: bool) -> None:
    text = "".join(parts)
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert split(pieces, inside) == split([text], inside)


def test_no_part_of_a_tag_is_ever_pushed_out() -> None:
    splitter = ReasoningSplitter(START, END, False)
    seen = [splitter.push(c) for c in "<think>yes</think>no"]
    assert "".join(c for c, _ in seen) == "no"
    assert "".join(r for _, r in seen) == "yes"


def test_text_that_cannot_be_a_tag_is_not_held_back() -> None:
    splitter = ReasoningSplitter(START, END, False)
    assert splitter.push("Hello <") == ("Hello ", "")
    assert splitter.push("b") == ("<b", "")
    assert splitter.push("<think>\nfirst") == ("", "first")
    assert splitter.push("\n") == ("", "")
    assert splitter.push("second") == ("", "\nsecond")


@pytest.mark.parametrize(("start", "end"), [("", ""), ("<think>", ""), ("", "</think>")])
def test_without_tags_everything_is_content_at_once(start: str, end: str) -> None:
    splitter = ReasoningSplitter(start, end, True)
    assert splitter.push("\n<think>x") == ("\n<think>x", "")
    assert splitter.finish() == ("", "")


def test_starts_inside_looks_at_the_end_of_the_prompt_only() -> None:
    assert starts_inside("<|assistant|><think>\n", START, END)
    assert starts_inside("<|assistant|><think>", START, END)
    assert not starts_inside("<|assistant|><think>\n\n</think>\n\n", START, END)
    assert not starts_inside("what is <think>?<|assistant|>", START, END)
    assert not starts_inside("anything", "", "")
