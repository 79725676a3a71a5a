"""Detokenizing: never half a character, in the end the tokenizer's own decoding, in constant time for each token."""

from __future__ import annotations

import random

import pytest
from doubles import byte_tokenizer_json, sentencepiece_tokenizer_json
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_ros.runtime.detokenize import Detokenizer
from edgellm_ros.tokenizer import Tokenizer

TOKENIZERS = {
    # The merges cut "ü" and the robot's four bytes in odd places: tokens that end in the middle of a character.
    "bytes": Tokenizer(byte_tokenizer_json([("Ġ", "a"), ("a", "Ã"), ("¼", "Ġ"), ("ð", "Ł"), ("¤", "ĸ"), ("h", "e")])),
    "sentencepiece": Tokenizer(sentencepiece_tokenizer_json()),
}
TEXT = "he said: où?  über 🤖🤖 — 你好, the world\n\té"


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_text_comes_back_and_no_piece_has_half_a_character(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    pieces = stream(tokenizer, tokenizer.encode(TEXT))
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 10, "it streams"


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_ids_give_in_the_end_what_decoding_them_all_gives(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_valid_text_never_shows_a_replacement_character(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces).count("\ufffd") == tokenizer.decode(tokenizer.encode(text)).count("\ufffd")
    assert all("\ufffd" in text for piece in pieces if "\ufffd" in piece)


def test_an_incomplete_character_is_replaced_at_the_end() -> None:
    ids = list("é".encode())[:1]
    assert stream(TOKENIZERS["bytes"], ids) == ["", "\ufffd"]


def test_a_leading_space_is_stripped_once_and_special_tokens_do_not_count() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.encode("the world")
    bos = tokenizer.token_to_id("<s>")
    assert bos is not None
    assert "".join(stream(tokenizer, [bos, *ids, bos, *ids])) == "the world the world"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_each_token_costs_the_same_however_long_the_text_is(kind: str) -> None:
    tokenizer, random_ids = TOKENIZERS[kind], random.Random(1)
    decoded = []
    inner = tokenizer.decode

    class Counting(Tokenizer):
        def __init__(self) -> None:
            self.__dict__.update(tokenizer.__dict__)

        def decode(self, ids, skip_special=True):  # type: ignore[no-untyped-def]
            decoded.append(len(ids))
            return inner(ids, skip_special)

    letters = [i for i in range(tokenizer.vocab_size) if tokenizer.byte_value(i) is None]
    stream(Counting(), [random_ids.choice(letters) for _ in range(3000)])
    assert sum(decoded) <= 3000 * 6
