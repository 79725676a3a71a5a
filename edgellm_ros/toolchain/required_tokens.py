"""Which tokens no reduced vocabulary may lack: without them a chat could not end, or some text not be said at all."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable

import jinja2

from edgellm_ros.errors import CheckpointError
from edgellm_ros.manifest import TokenSpec
from edgellm_ros.tokenizer import Tokenizer

_DIGITS = re.compile(r"[ \u2581]?[0-9]+")
# A call as the chat templates of the known families ask for it; each text is cut into tokens as the model would.
_CALL = '{"name": "f", "arguments": {"a": 1, "b": ["c", true, false, null], "d": {"e": -0.5e3}}}'
_COMPACT = _CALL.replace(": ", ":").replace(", ", ",")
_INDENTED = '{\n  "name": "f",\n  "arguments": {\n    "a": 1,\n    "b": [\n      "c"\n    ]\n  }\n}'
_TOOL_CALLS = (
    f"<tool_call>\n{_CALL}\n</tool_call>",
    f"<tool_call>{_COMPACT}</tool_call>",
    f"[TOOL_CALLS][{_CALL}]",
    f"<|python_tag|>{_CALL.replace('arguments', 'parameters')}",
    f"```json\n{_INDENTED}\n```",
    f"<function=f>{_COMPACT}</function>",
    '{}, [], {"a": {}}, ""',
)


def required_tokens(
    tokenizer_json: str, tokens: TokenSpec, chat_template: str | None, vocab_size: int
) -> dict[str, set[int]]:
    """The token ids that must stay, by why; a token is listed under every reason that it has.

    Raises CheckpointError for a vocabulary that cannot express every text even when it is whole.
    """
    tokenizer = Tokenizer(tokenizer_json)
    spellings = {i: tokenizer.id_to_token(i) for i in range(min(tokenizer.vocab_size, vocab_size))}
    added = {i for i in _added_ids(tokenizer_json) if i < vocab_size}
    ends = {i for i in (*tokens.stop_ids, tokens.bos_id, tokens.pad_id) if i is not None}
    marks = (tokens.think_start, tokens.think_end, tokens.bos_token, tokens.eos_token)
    found = {
        "special and added tokens": added | tokenizer.special_ids,
        "stop, BOS and padding ids": ends,
        "bytes and single characters": _fallback(tokenizer, spellings),
        "digits": {i for i, text in _texts(tokenizer, spellings).items() if _DIGITS.fullmatch(text)},
        "chat template": _ids(tokenizer, (*_template_texts(chat_template or ""), *marks)),
        "tool calls": _ids(tokenizer, _TOOL_CALLS),
    }
    return {why: {i for i in ids if i < vocab_size} for why, ids in found.items()}


def _added_ids(tokenizer_json: str) -> set[int]:
    return {int(entry["id"]) for entry in json.loads(tokenizer_json).get("added_tokens") or []}


def _texts(tokenizer: Tokenizer, spellings: dict[int, str | None]) -> dict[int, str]:
    """What tokens add to a text, for those whose bytes are valid UTF-8 alone."""
    found = {}
    for token, spelling in spellings.items():
        if spelling is not None:
            try:
                found[token] = tokenizer.token_bytes(token).decode()
            except UnicodeDecodeError:
                continue
    return found


def _fallback(tokenizer: Tokenizer, spellings: dict[int, str | None]) -> set[int]:
    """The tokens that every text can be spelt with: all 256 bytes, else every single character.

    SentencePiece has bytes as `<0x0A>` besides its one-character pieces; of those the ASCII ones stay as well, because
    the plain letter is what the model was taught to write.
    """
    if tokenizer.byte_level:
        of_byte = {tokenizer.token_bytes(i): i for i, text in spellings.items() if text and len(text) == 1}
        bytes_found = {key[0]: token for key, token in of_byte.items() if len(key) == 1}
        if len(bytes_found) == 256:
            return set(bytes_found.values())
    else:
        values = {i: tokenizer.byte_value(i) for i in spellings}
        of_value = {i for i, value in values.items() if value is not None}
        if len({values[i] for i in of_value}) == 256:
            return of_value | {i for i, text in spellings.items() if text and (text == "\u2581" or _is_ascii(text))}
    characters = {i for i, text in spellings.items() if text and len(_bare(text)) <= 1}
    if not characters:
        raise CheckpointError("the tokenizer has neither bytes nor single characters; its vocabulary cannot be reduced")
    return characters


def _bare(text: str) -> str:
    """A piece without the mark that says where in a word it stands (SentencePiece's, WordPiece's)."""
    return text[2:] if text.startswith("##") else text.removeprefix("\u2581")


def _is_ascii(text: str) -> bool:
    bare = _bare(text)
    return len(bare) == 1 and bare.isascii()


def _ids(tokenizer: Tokenizer, texts: Iterable[str]) -> set[int]:
    return {token for text in texts if text for token in tokenizer.encode(text)}


def _template_texts(template: str) -> list[str]:
    """The literal texts in a Jinja template, outside and inside of its expressions.

    Lexing and not parsing, so that tags which only some programs know do no harm.
    """
    try:
        pieces = list(jinja2.Environment(trim_blocks=True, lstrip_blocks=True).lex(template))
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"the chat template is not valid Jinja: {error}") from error
    found = []
    for _, kind, text in pieces:
        if kind == "data":
            found.append(text)
        elif kind == "string":
            try:
                found.append(ast.literal_eval(text))
            except (SyntaxError, ValueError):
                found.append(text[1:-1])
    return found
