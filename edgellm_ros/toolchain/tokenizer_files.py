"""Which tokenizer, chat template and special tokens a Hugging Face directory has: they are spread over six files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from edgellm_ros.errors import CheckpointError
from edgellm_ros.manifest import TokenSpec
from edgellm_ros.toolchain.config_values import positive_int

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>")
_MOST_IDS = 2**31  # where a configuration leaves its size to the family: token ids are int32
THINK_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


class HfTokenizerFiles:
    """The tokenizer's side of a Hugging Face directory; files are read when asked for."""

    def __init__(self, path: Path) -> None:
        """`path` is the directory; a file that is optional may be missing."""
        self.path = path

    def tokenizer_json(self) -> str:
        """tokenizer.json as it is; raises CheckpointError when it is missing or not one."""
        path = self.path / "tokenizer.json"
        if not path.is_file():
            slow = [name for name in ("tokenizer.model", "vocab.json") if (self.path / name).is_file()]
            if slow:
                raise CheckpointError(
                    f"{self.path} has {slow[0]} and no tokenizer.json; write one with transformers: "
                    "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
                )
            raise CheckpointError(f"{self.path} has no tokenizer.json; download the model's tokenizer files")
        if not isinstance(read_json_object(path).get("model"), dict):
            raise CheckpointError(f"{path} has no model; it is not a file of the tokenizers library")
        return path.read_text(encoding="utf-8")

    def chat_template(self) -> str | None:
        """chat_template.jinja, else chat_template.json's, else tokenizer_config.json's; of several the default."""
        path = self.path / "chat_template.jinja"
        if path.is_file():
            return _read_text(path)
        template = self._optional("chat_template.json").get("chat_template")
        if template is None:
            template = self._optional("tokenizer_config.json").get("chat_template")
        if isinstance(template, list):
            try:
                named = {item["name"]: item["template"] for item in template}
            except (TypeError, KeyError) as error:
                raise CheckpointError(
                    f"{self.path}: chat_template is {template!r:.80}; it must be a text, or a list of objects with "
                    "name and template: download tokenizer_config.json again"
                ) from error
            if "default" not in named and len(named) > 1:
                raise CheckpointError(f"{self.path}: of the chat templates {', '.join(named)} none is called default")
            template = named.get("default", next(iter(named.values()), None))
        if template is not None and not isinstance(template, str):
            raise CheckpointError(f"{self.path}: chat_template is {type(template).__name__}; it must be a text")
        return template

    def token_spec(self, config: Mapping[str, Any]) -> TokenSpec:
        """Special tokens; `config` is config.json. Stop ids are those of all files, then end-of-turn tokens.

        Raises CheckpointError for a tokenizer.json that the tokenizers library cannot read, or that lacks a token, and
        for a BOS or EOS id that the model cannot have.
        """
        text = self.tokenizer_json()
        tokenizer = json.loads(text)
        try:
            tokenizers.Tokenizer.from_str(text)
            ids = vocabulary(tokenizer)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"{self.path / 'tokenizer.json'} cannot be read: {error}; download it again, or update "
                "the package tokenizers"
            ) from error
        settings = self._optional("tokenizer_config.json")
        texts = {**self._optional("special_tokens_map.json"), **settings}
        generation = self._optional("generation_config.json")
        bos, eos, pad = (_token_text(texts.get(key)) for key in ("bos_token", "eos_token", "pad_token"))
        size = positive_int(config, "vocab_size", _MOST_IDS)

        def known(*values: Any) -> list[int]:
            """The ids that the model has; configurations write -1, or an id of another vocabulary, for no padding."""
            return [i for value in values for i in _ids(value) if 0 <= i < size]

        def checked(key: str) -> list[int]:
            """The ids of both files."""
            files = (("generation_config.json", generation), ("config.json", config))
            return [i for name, values in files for i in _checked_ids(self.path / name, values, key, size)]

        named = known(ids.get(bos))
        bos_id = next(iter(named or checked("bos_token_id")), None)
        pads = known(generation.get("pad_token_id"), config.get("pad_token_id"))
        pad_id = ids[pad] if pad in ids else next(iter(pads), None)
        add_bos = settings.get("add_bos_token")
        if not isinstance(add_bos, bool):
            add_bos = _template_starts_with(tokenizer.get("post_processor"), bos)
        template = self.chat_template() or ""
        self._check_added(settings, ids, template)
        think_start, think_end = think_marks(ids, template)
        stops = [*checked("eos_token_id"), *known(ids.get(eos))]
        return TokenSpec(
            stop_ids=unique([*stops, *known(end_of_turn_ids(ids, template))]),
            bos_id=bos_id,
            pad_id=pad_id,
            add_bos=add_bos and bos_id is not None,
            bos_token=bos,
            eos_token=eos,
            think_start=think_start,
            think_end=think_end,
        )

    def _check_added(self, settings: Mapping[str, Any], ids: Mapping[str, int], template: str) -> None:
        """Raise for a token that only transformers would know: a prompt would hold its letters in its place."""
        added = settings.get("added_tokens_decoder")
        for token in added.values() if isinstance(added, dict) else ():
            text = _token_text(token)
            if text and text in template and text not in ids:
                raise CheckpointError(
                    f"{self.path}: tokenizer_config.json adds the token {text!r}, which the chat template writes and "
                    "tokenizer.json lacks; write both anew with transformers: "
                    "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
                )

    def _optional(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return read_json_object(path) if path.is_file() else {}


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises CheckpointError when it holds none."""
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; it must hold an object")
    return value


def vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a parsed tokenizer.json and its id, added tokens included."""
    vocab = tokenizer["model"].get("vocab") or {}
    if isinstance(vocab, list):  # a Unigram model has pairs of text and score
        vocab = {item[0]: index for index, item in enumerate(vocab)}
    return {**vocab, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}}


def end_of_turn_ids(ids: Mapping[str, int], template: str) -> list[int]:
    """Tokens that end a turn in this chat template: known by name, in the vocabulary, and written in the template."""
    return [ids[token] for token in END_OF_TURN if token in ids and token in template]


def think_marks(ids: Mapping[str, int], template: str) -> tuple[str, str]:
    """The texts around reasoning if the vocabulary or the template has both of them, else empty ones."""
    for start, end in THINK_MARKS:
        if (start in ids and end in ids) or (start in template and end in template):
            return start, end
    return "", ""


def unique(values: Iterable[int]) -> tuple[int, ...]:
    """The values without repetitions, in order."""
    return tuple(dict.fromkeys(values))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error


def _token_text(value: Any) -> str:
    """A special token is written as its text, or as an object with the text in `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def _checked_ids(file: Path, values: Mapping[str, Any], key: str, size: int) -> list[int]:
    """The token ids at `key`, a number, a list or null; CheckpointError for what no vocabulary of `size` has."""
    value = values.get(key)
    found = []
    for item in value if isinstance(value, list) else [] if value is None else [value]:
        number = int(item) if isinstance(item, float) and item.is_integer() else item
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < size:
            raise CheckpointError(
                f"{file}: {key} is {value!r:.80}; it must be a whole number from 0 to {size - 1}, a list of them, or "
                "null: correct it, or download the file again"
            )
        found.append(number)
    return found


def _template_starts_with(post_processor: Any, token: str) -> bool:
    """Whether a tokenizer.json's post-processor puts `token` in front of a text."""
    if not isinstance(post_processor, dict) or not token:
        return False
    for part in post_processor.get("processors", [post_processor]):
        if part.get("type") == "TemplateProcessing" and part.get("single"):
            first = part["single"][0].get("SpecialToken")
            return bool(first and first.get("id") == token)
    return False
