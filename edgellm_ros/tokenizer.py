"""Text to token ids and back, with the `tokenizers` library alone; what a special token in a text means is said here.

Special and added tokens in a text are always parsed into their ids: a rendered chat prompt depends on it. The price is
that `<|im_end|>` typed by a user is also that token, as in Hugging Face; a caller that does not trust its users' texts
removes such strings before it renders them.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers

from edgellm_ros.errors import BundleError, RequestError

# Characters that NFC makes one of at most: the longest canonical decomposition, which a test looks for
_NFC_SHRINKS = 4


class Tokenizer:
    """A bundle's tokenizer.json. Thread-safe once built."""

    def __init__(self, text: str, visible: Iterable[str] = ()) -> None:
        """Build from the text of a tokenizer.json; raises BundleError when it is not one.

        `visible` names special tokens that `decode` must not skip (the marks around reasoning, say).
        """
        shown = {token for token in visible if token}
        try:
            raw: dict[str, Any] = json.loads(text)
            for entry in raw.get("added_tokens") or []:
                if entry["content"] in shown:
                    entry["special"] = False
            self._inner = tokenizers.Tokenizer.from_str(json.dumps(raw, ensure_ascii=False))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"tokenizer.json cannot be read: {error}; export the model again") from error
        self._inner.no_truncation()
        self._inner.no_padding()
        added = self._inner.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self._special_texts = frozenset(token.content for token in added.values() if token.special)
        self.byte_level: bool = (raw.get("decoder") or {}).get("type") == "ByteLevel"
        self.vocab_size: int = self._inner.get_vocab_size(with_added_tokens=True)
        self._longest_token, self._dropped = _longest_token(raw)
        self._strips = any(entry.get("lstrip") or entry.get("rstrip") for entry in raw.get("added_tokens") or [])

    def min_tokens(self, text: str) -> int:
        """Tokens that `text` has at least, without encoding it; 0 where this tokenizer allows no such bound."""
        if not self._longest_token:
            return 0
        # An added token may take all white space beside it; what Python splits at includes all that Rust calls so.
        length = sum(map(len, text.split())) if self._strips else len(text)
        length -= sum(map(text.count, self._dropped))
        return max(-(-length // self._longest_token), 0)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; `add_special_tokens` lets the tokenizer's own post-processor add BOS and the like.

        Raises RequestError for a text with a lone surrogate.
        """
        try:
            ids: list[int] = self._inner.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError) as error:  # which of them depends on the library's version
            raise _refusal(text) from error
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; ids that the tokenizer does not know give nothing."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_to_id(self, token: str) -> int | None:
        """Id of the token written exactly so in the vocabulary, or None."""
        try:
            found: int | None = self._inner.token_to_id(token)
        except (UnicodeEncodeError, TypeError) as error:
            raise _refusal(token) from error
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """How the vocabulary writes a token, or None for an id without one (a padded row of the head)."""
        found: str | None = self._inner.id_to_token(token_id)
        return found

    def is_skipped(self, token_id: int) -> bool:
        """Whether `decode` gives nothing for this id: a special token, or an id without a token."""
        token = self.id_to_token(token_id)
        return token is None or token in self._special_texts

    def byte_value(self, token_id: int) -> int | None:
        """The byte that a byte-fallback token (`<0x0A>`) stands for, else None."""
        token = self.id_to_token(token_id)
        if token is None or len(token) != 6 or not token.startswith("<0x") or token[5] != ">":
            return None
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token adds in the middle of a text; for byte-level tokenizers exactly."""
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        if self.byte_level:
            try:
                return bytes([_BYTE_OF_CHAR[char] for char in token])
            except KeyError:  # an added token with a character outside the alphabet stands for itself
                return token.encode()
        value = self.byte_value(token_id)
        return token.replace("\u2581", " ").encode() if value is None else bytes([value])


def _refusal(text: object) -> RequestError:
    """Of what the library cannot take: no text, or one with surrogates, which UTF-8 does not have."""
    if not isinstance(text, str):
        return RequestError(f"the text is {reprlib.repr(text)}; it must be of type str")
    place = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    return RequestError(
        f"the text has the lone surrogate {text[place]!r} at character {place}, counted from 0; allowed is text that "
        "UTF-8 can encode; replace it, for example with errors='replace' where the text is decoded"
    )


def _longest_token(raw: dict[str, Any]) -> tuple[int, str]:
    """Characters of a text that a token of this tokenizer.json covers at most, and those that are dropped from a text.

    The first is 0 where it is not known: where more than single characters may be dropped, or be one token together.
    """
    model, unknown = raw["model"], (0, "")
    normalizer, pre_tokenizer = raw.get("normalizer"), raw.get("pre_tokenizer")
    shrinks = _shrinking(normalizer)
    affixes = any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
    if model.get("type") != "BPE" or affixes or not shrinks or not _keeps_text(pre_tokenizer):
        return unknown
    vocab: dict[str, int] = model["vocab"]
    dropped = ""
    if _is_byte_level(pre_tokenizer):
        # Bytes that training never saw have no token. A character beyond ASCII is more than its first byte.
        missing = [byte for char, byte in _BYTE_OF_CHAR.items() if char not in vocab]
        dropped = "".join(chr(byte) for byte in missing if byte < 0x80)
        if any(0x80 <= byte < 0xC0 for byte in missing) or (dropped and normalizer):
            return unknown
    elif not model.get("byte_fallback") or any(f"<0x{byte:02X}>" not in vocab for byte in range(256)):
        return unknown
    added = [entry["content"] for entry in raw.get("added_tokens") or []]
    longest = max(map(len, (*vocab, *added)), default=1) + _prepended(normalizer)  # to added tokens, too
    return shrinks * longest, dropped


def _prepended(normalizer: dict[str, Any] | None) -> int:
    """Characters that a normalizer puts before a text."""
    if not normalizer:
        return 0
    parts = normalizer.get("normalizers", [normalizer])
    return sum(len(part["prepend"]) for part in parts if part["type"] == "Prepend")


def _shrinking(normalizer: dict[str, Any] | None) -> int:
    """Into how many times fewer characters a normalizer turns a text at most; 0 where that is not known."""
    if not normalizer:
        return 1
    kind = normalizer["type"]
    if kind == "Sequence":
        return math.prod(_shrinking(part) for part in normalizer["normalizers"])
    if kind == "Replace":
        pattern = normalizer["pattern"].get("String", "")
        return int(0 < len(pattern) <= len(normalizer["content"]))
    return {"Prepend": 1, "NFC": _NFC_SHRINKS}.get(kind, 0)


def _keeps_text(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether cutting a text into words drops nothing of it, as white space."""
    if not pre_tokenizer:
        return True
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return all(map(_keeps_text, pre_tokenizer["pretokenizers"]))
    return kind in ("ByteLevel", "Digits", "Metaspace") or (
        kind == "Split" and pre_tokenizer["behavior"] != "Removed"
    )


def _is_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    return any(part is not None and part["type"] == "ByteLevel" for part in parts)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted (openai/gpt-2, src/encoder.py: bytes_to_unicode)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    alphabet = {chr(byte): byte for byte in plain}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


_BYTE_OF_CHAR = _byte_alphabet()
