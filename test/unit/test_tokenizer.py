"""The tokenizer: texts come back, special tokens in a text are tokens, a broken file is a BundleError."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from doubles import EOS, byte_tokenizer, byte_tokenizer_json, sentencepiece_tokenizer_json
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_ros.errors import BundleError, RequestError
from edgellm_ros.tokenizer import _NFC_SHRINKS, Tokenizer


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
    said = r"lone surrogate '\\ud800' at character 1, counted from 0; allowed is text that UTF-8 can encode; replace it"
    for call in (byte_tokenizer().encode, byte_tokenizer().token_to_id):
        with pytest.raises(RequestError, match=said):
            call("a\ud800")


MERGES = [("\u0120", "\u0120"), ("\u0120\u0120", "\u0120\u0120"), ("\u0120" * 4, "\u0120" * 4), ("a", "b"), ("ab", "ab")]


def altered(text: str, **parts: Any) -> Tokenizer:
    """Of a tokenizer.json with other parts; `added` are fields of its added tokens, `model` of its model."""
    raw = json.loads(text)
    for entry in raw["added_tokens"]:
        entry.update(parts.get("added", {}))
    raw["model"].update(parts.pop("model", {}))
    parts.pop("added", None)
    return Tokenizer(json.dumps(raw | parts))


def without_bytes(*dropped: int) -> str:
    """Byte-level without a token for some bytes, as where training never saw them."""
    raw = json.loads(byte_tokenizer_json())
    gone = {Tokenizer(byte_tokenizer_json()).id_to_token(byte) for byte in dropped}
    raw["model"]["vocab"] = {token: i for token, i in raw["model"]["vocab"].items() if token not in gone}
    return json.dumps(raw)


NFC = {"type": "NFC"}
DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BOUNDED = {
    "spaces that merge": altered(byte_tokenizer_json(MERGES)),
    "NFC": altered(byte_tokenizer_json(MERGES), normalizer=NFC),
    "digits apart": altered(byte_tokenizer_json(MERGES), pre_tokenizer={"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}),
    "tokens that take the spaces beside them": altered(byte_tokenizer_json(MERGES), added={"lstrip": True, "rstrip": True}),
    "bytes that are dropped": altered(without_bytes(4, 29, 0xC0, 0xF1)),
    "SentencePiece": Tokenizer(sentencepiece_tokenizer_json()),
}


@pytest.mark.parametrize("kind", BOUNDED)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_text_never_has_fewer_tokens_than_its_length_says(kind: str, data: st.DataObject) -> None:
    pieces = st.sampled_from(
        [" ", " " * 64, "\t", "\n\n", "abab", "ababab" * 9, "<eos>", "  <system>  ", "</s>", "<s>", "he lo", "7", "\x04" * 5,
         "\x1d", "\u1f82", "\u03b1\u0313\u0300\u0345", "\u0345", "\u037e", "\u1100\u1161\u11a8", "\U00060000", "\u2003", "\u2581"]
    )  # fmt: skip
    text = "".join(data.draw(st.lists(st.one_of(pieces, st.text(max_size=5)), max_size=30)))
    tokenizer = BOUNDED[kind]
    assert tokenizer.min_tokens(text) <= len(tokenizer.encode(text))


def test_an_added_token_that_is_normalized_too_covers_what_is_put_before_it() -> None:
    raw = json.loads(sentencepiece_tokenizer_json())
    content = "f" + "o" * 40
    raw["added_tokens"].append({
        "id": len(raw["model"]["vocab"]), "content": content, "normalized": True, "single_word": False, "lstrip": False,
        "rstrip": False, "special": False,
    })  # fmt: skip
    tokenizer, text = Tokenizer(json.dumps(raw)), f" {content}" * 2000
    assert 0 < tokenizer.min_tokens(text) <= len(tokenizer.encode(text)) < 2010


def test_what_is_no_text_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match=r"the text is \['a'\]; it must be of type str"):
        byte_tokenizer().encode(["a"])  # type: ignore[arg-type]


def test_nfc_makes_one_character_of_four_at_most() -> None:
    decomposed = (unicodedata.normalize("NFD", chr(point)) for point in range(0x110000))
    assert max(map(len, decomposed)) == _NFC_SHRINKS


@pytest.mark.parametrize("kind", BOUNDED)
def test_a_long_text_has_many_tokens_by_its_length_alone(kind: str) -> None:
    assert BOUNDED[kind].min_tokens("he" * 10**5) >= 4000


def test_spaces_that_are_one_token_bound_the_length_as_they_merge() -> None:
    tokenizer = Tokenizer(byte_tokenizer_json([*MERGES, ("\u0120" * 8, "\u0120" * 8)]))
    assert len(tokenizer.encode(" " * 1600)) == 100 == tokenizer.min_tokens(" " * 1600)


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "NFKD"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "  "}, "content": " "}},
        {"normalizer": {"type": "Sequence", "normalizers": [NFC, {"type": "Lowercase"}]}},
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}},
        {"pre_tokenizer": None, "model": {"unk_token": "<eos>", "fuse_unk": True}},
        {"model": {"continuing_subword_prefix": "#"}},
    ],
)
def test_a_tokenizer_that_may_drop_or_join_text_bounds_nothing(parts: dict[str, Any]) -> None:
    assert altered(byte_tokenizer_json(), **parts).min_tokens("x" * 10**6) == 0
    assert altered(without_bytes(4), normalizer=NFC).min_tokens("x" * 10**6) == 0
    assert altered(without_bytes(0x80)).min_tokens("x" * 10**6) == 0
