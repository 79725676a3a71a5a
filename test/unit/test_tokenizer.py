"""The tokenizer: texts come back, special tokens in a text are tokens, a broken file is a BundleError."""

from __future__ import annotations

import json

import pytest
from doubles import EOS, byte_tokenizer, byte_tokenizer_json, sentencepiece_tokenizer_json

from edgellm_ros.errors import BundleError, RequestError
from edgellm_ros.tokenizer import Tokenizer


def test_special_tokens_in_a_text_are_parsed() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("a<eos>b") == [97, EOS, 98]
    assert tokenizer.decode([97, EOS, 98]) == "ab"
    assert tokenizer.decode([97, EOS, 98], skip_special=False) == "a<eos>b"
    assert EOS in tokenizer.special_ids and tokenizer.token_to_id("<eos>") == EOS


def test_a_visible_token_is_parsed_and_shown() -> None:
    tokenizer = Tokenizer(byte_tokenizer_json(), visible=("<system>", ""))
    system = tokenizer.token_to_id("<system>")
    assert tokenizer.encode("<system>a") == [system, 97]
    assert tokenizer.decode([system, 97, EOS]) == "<system>a"


def test_the_bytes_of_tokens_are_those_of_their_text() -> None:
    for text_of, text in ((byte_tokenizer_json(), "où 🤖"), (sentencepiece_tokenizer_json(), " où 🤖")):
        tokenizer = Tokenizer(text_of)
        ids = tokenizer.encode("où 🤖")
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.byte_value(tokenizer.token_to_id("<0x0A>") or 0) == 10
    assert tokenizer.byte_value(tokenizer.token_to_id("h") or 0) is None
    assert tokenizer.token_bytes(10**6) == b"" and tokenizer.is_skipped(10**6)


def test_padding_and_truncation_of_the_file_are_not_applied() -> None:
    raw = json.loads(byte_tokenizer_json())
    raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    assert Tokenizer(json.dumps(raw)).encode("abcd") == [97, 98, 99, 100]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"added_tokens": [1]}', byte_tokenizer_json()[:500]])
def test_a_broken_file_is_a_bundle_error(text: str) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer(text)


def test_text_that_is_not_unicode_is_the_callers_error() -> None:
    with pytest.raises(RequestError, match="Unicode"):
        byte_tokenizer().encode("a\ud800")
